"""How a run ends: done, or stopped with valid events, an exit status and a word on what to do."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from safetensors import SafetensorError

from steer_heal.records import UserError
from steer_heal.resume import handled
from steer_heal.session import Session
from steer_heal.terminal import say


def guard(session: Session, loop: Callable[[Session], None]) -> int:
    """Runs the loop; a mendable error, Ctrl-C, no memory or no disk ends it in peace. Returns the exit status."""
    try:
        loop(session)
        return 0
    except UserError as error:
        return _stop(session, 1, str(error), f"error: {error}")
    except KeyboardInterrupt as stopped:
        return _stop(session, getattr(stopped, "status", 130), "interrupted", "stopped")
    except torch.OutOfMemoryError as error:
        words = f"error: out of memory; lower --gen.batch-size, --eval.batch-size or --heal.batch-size ({error})"
        return _stop(session, 1, "out of memory", words)
    except (OSError, SafetensorError) as error:
        return _stop(session, 1, None, f"error: could not write to {session.folder}: {error}; free some space")
    finally:
        session.log.close()
        session.lock.close()


def _stop(session: Session, status: int, error: str | None, words: str) -> int:
    """Says why the run ends here and how it goes on; a disk that is full by now must not hide that."""
    with handled(signal.SIG_IGN), suppress(OSError):
        say(f"{words}\ngo on with: python -m steer_heal.run --resume {shlex.quote(str(session.folder))}", sys.stderr)
        if error is not None:
            session.log.write("run_end", None, error=error)
    return status

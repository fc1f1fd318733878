"""Small runs of the fast-dev preset, ways to kill them, and whether they came to the same end."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from steer_heal.run import main

SETTINGS = (
    "--quiet --n-threads 1 --steer.n-contexts 4 --gen.max-new-tokens 6 --gen.batch-size 4 --heal.spectral 0.1 "
    "--eval.think-tokens 1 --eval.n-texts 2 --eval.n-prompts 2 --eval.max-new-tokens 6 --eval.n-bootstrap 10"
).split()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@contextmanager
def undrawn() -> Iterator[None]:
    """No pictures, which are functions of the events; and threads as other tests expect them."""
    n_threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    patch.setattr("steer_heal.session.draw", lambda folder: None)
    try:
        yield
    finally:
        patch.undo()
        torch.set_num_threads(n_threads)


def started(out, settings, *flags):
    try:
        assert main(["fast-dev", "--out", str(out), *settings, *flags]) == 0
    except Killed:
        pass
    return next(path for path in out.iterdir() if (path / "events.jsonl").exists())


def resumed(run):
    assert main(["--resume", str(run), "--quiet"]) == 0
    return run


def assert_same(run, whole):
    from compare import differences

    assert differences(run, whole) == []


def killing(monkeypatch, owner, name, on, when="after"):
    """Patches a function so that its call number `on` (from 0) kills the run; returns the list of calls."""
    calls, work = [], getattr(owner, name)

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 == on and when == "before":
            raise Killed
        result = work(*args, **kwargs)
        if len(calls) - 1 == on:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)
    return calls

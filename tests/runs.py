"""Small runs of the fast-dev preset, ways to kill them, and whether they came to the same end."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from steer_heal import define_trait
from steer_heal.__main__ import main
from steer_heal.commands import run as run_command
from steer_heal.runs.log import FIRST, line_hash, lines_of
from steer_heal.stages import heal as heal_module
from steer_heal.stages import passes

SETTINGS = (
    "--quiet --n-threads 1 --steer.n-contexts 4 --gen.max-new-tokens 6 --gen.batch-size 4 --heal.spectral 0.1 "
    "--eval.think-tokens 1 --eval.n-texts 2 --eval.n-prompts 2 --eval.max-new-tokens 6 --eval.n-bootstrap 10"
)

PROMPTS = [f"Shall I open door {i}?" for i in range(12)]
PAIRS = [{"prompt": f"Is door {i} open?", "positive": "Yes, come in.", "negative": "No, stay out."} for i in range(4)]
DOORS = define_trait("You open doors.", "You lock doors.", PROMPTS, pairs=PAIRS)

UNDRAWN = (
    "import sys, steer_heal.commands.run as r; r.draw = lambda folder: None; from steer_heal.__main__ import main; "
)
UNDRAWN_COMMAND = [sys.executable, "-c", UNDRAWN + "sys.exit(main())"]
"""The command in a process of its own, without pictures, which are functions of the events."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@contextmanager
def undrawn() -> Iterator[None]:
    """No pictures; and threads as other tests expect them."""
    n_threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    patch.setattr(run_command, "draw", lambda folder: None)
    try:
        yield
    finally:
        patch.undo()
        torch.set_num_threads(n_threads)


def started(out, settings, *flags):
    with suppress(Killed):
        assert main(["run", "fast-dev", "--out", str(out), *settings, *flags]) == 0
    return next(path for path in out.iterdir() if (path / "events.jsonl").exists())


def resumed(run, *flags):
    assert main(["resume", str(run), "--quiet", *flags]) == 0
    return run


def recorded(run) -> list[dict]:
    """The events of a run as JSON objects."""
    return [json.loads(line) for line in lines_of(run)]


def of(events, kind, state=None) -> list[dict]:
    """The events of a kind; of measured ones, those of a state."""
    return [e for e in events if e["event"] == kind and (state is None or e["state"] == state)]


def assert_same(run, whole):
    from compare import differences

    found = differences(run, whole)
    assert not found, found[:5]


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


def rewritten(run, change, chained=False):
    """Applies `change` to the list of a run's events and writes them back; `chained`: with links that hold."""
    events, previous, lines = recorded(run), FIRST, []
    change(events)
    for event in events:
        if chained:
            event["prev"] = previous
        lines.append(json.dumps(event).encode() + b"\n")
        previous = line_hash(lines[-1])
    (run / "events.jsonl").write_bytes(b"".join(lines))


POISONED_STEP, FULL_LR = 2, 1e-4


def poisoned(monkeypatch, always=False):
    """One completion's loss is NaN at one step of every heal: at the full learning rate, or at any."""
    losses, schedule, at = passes.losses, heal_module.schedule, {"step": -1, "bad": None}

    def watched(step, n_steps):
        at.update(step=step, bad=None)
        return schedule(step, n_steps)

    def poisoned_losses(lm, batch, cfg, *states):
        ce, divergence = losses(lm, batch, cfg, *states)
        if at["step"] == POISONED_STEP and (always or cfg.lr == FULL_LR):
            at["bad"] = at["bad"] or batch[-1].ids
            ce = ce * torch.tensor([float("nan") if sample.ids == at["bad"] else 1.0 for sample in batch])
        return ce, divergence

    monkeypatch.setattr(heal_module, "schedule", watched)
    for module in (heal_module, passes):
        monkeypatch.setattr(module, "losses", poisoned_losses)

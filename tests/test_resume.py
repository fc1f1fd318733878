"""A run that was stopped, at any moment and however often, ends as if it had never stopped."""

import pytest
from runs import Killed, assert_same, killing, poisoned, resumed, rewritten, started

import steer_heal.round as steps
from steer_heal import session as session_module
from steer_heal.errors import UserError
from steer_heal.model import decode
from steer_heal.model.lm import load
from steer_heal.model.steering import Vector
from steer_heal.model.student import Student
from steer_heal.run import main
from steer_heal.runs import events as events_module
from steer_heal.runs.checkpoint import WrittenTexts, saved_steps
from steer_heal.runs.events import EventLog, of_stage, read_events, read_results
from steer_heal.runs.resume import partial_path, truncate_events
from steer_heal.session import Session

pytestmark = pytest.mark.usefixtures("quick")
ONE, TWO = ["--n-rounds", "1"], ["--n-rounds", "2", "--no-control"]
"""Flags of the fixtures of these names."""


# --- killed ------------------------------------------------------------------------------------------------------
def assert_survives(settings, out, whole, monkeypatch, save_every_s):
    """Each line is written for the first time by a process that then dies; the last one ends as `whole`."""
    monkeypatch.setattr(Session, "save_every_s", save_every_s)
    write, lines = EventLog.write, set()

    def deadly(self, stage, round_, **fields):
        event = write(self, stage, round_, **fields)
        line = (stage, round_, fields.get("step"), fields.get("lr"))
        if line not in lines:
            lines.add(line)
            raise Killed
        return event

    monkeypatch.setattr(EventLog, "write", deadly)
    run = started(out, settings)
    n_lives = 1
    while not read_results(out / "results.tsv"):
        try:
            main(["--resume", str(run), "--quiet"])
        except Killed:
            n_lives += 1
    assert n_lives == len(read_events(whole))
    assert_same(run, whole)


@pytest.mark.parametrize("name, flags, save_every_s", [("one", ONE, 3600.0), ("two", TWO, 0.0)])
def test_killed_after_every_line(name, flags, save_every_s, settings, tmp_path, monkeypatch, request):
    whole = request.getfixturevalue(name)
    assert_survives([*settings, *flags], tmp_path, whole, monkeypatch, save_every_s)


def test_killed_after_every_line_where_heals_were_tried_twice(settings, tmp_path, monkeypatch):
    poisoned(monkeypatch)
    whole = started(tmp_path / "whole", settings, *ONE)
    assert len(of_stage(read_events(whole), "heal_retry")) == 2
    assert_survives([*settings, *ONE], tmp_path / "killed", whole, monkeypatch, 0.0)


def test_killed_between_a_file_and_its_event(settings, one, tmp_path, monkeypatch):
    """One process after another dies, each at another file."""
    monkeypatch.setattr(Session, "save_every_s", 0.0)
    run = None
    for owner, name, on, when in (
        (Vector, "save", 0, "after"),
        (session_module, "save_heal", 0, "after"),
        (session_module, "save_heal", 0, "before"),
        (Student, "bake", 0, "after"),
        (Student, "save", 1, "after"),
        (events_module, "append_result", 0, "before"),
    ):
        with monkeypatch.context() as patch:
            calls = killing(patch, owner, name, on, when)
            if run is None:
                run = started(tmp_path, settings, *ONE)
            else:
                with pytest.raises(Killed):
                    resumed(run)
            assert len(calls) == on + 1
    assert_same(resumed(run), one)

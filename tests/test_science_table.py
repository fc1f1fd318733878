"""Every change of `just mutate` can still be made, so that none of them is passed over."""

from pathlib import Path

import pytest
from mutate import Mutation, Outcome, read_table
from places import ROOT


@pytest.mark.parametrize("mutation", read_table(), ids=lambda mutation: mutation.what)
def test_a_change_can_be_made_at_one_place(mutation: Mutation):
    assert mutation.problem(ROOT) == "" and mutation.old != mutation.new and mutation.tests


def test_changes_are_told_apart():
    table = read_table()
    assert len({each.what for each in table}) == len({(each.file, each.old, each.new) for each in table}) == len(table)


def test_a_change_without_one_place_is_named(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "test_a.py").write_text("")
    changes = [Mutation("", "a.py", old, "2", ("test_a.py",)).problem(tmp_path) for old in ("x = 1", "= 1", "z")]
    assert changes[0] == "" and "2 times" in changes[1] and "0 times" in changes[2]
    assert "b.py" in Mutation("", "b.py", "x", "y", ("test_a.py",)).problem(tmp_path)


def test_only_tests_that_failed_kill_a_change():
    """Not those that hung, were not found, or did not import the copy."""
    words = [Outcome(status, 0.0, "").word for status in (0, 1, None, 2, 5, -9, 99)]
    assert words == ["SURVIVED", "killed", "ERROR", "ERROR", "ERROR", "ERROR", "ERROR"]

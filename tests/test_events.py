"""The record of a run: one JSON object a line, each bound to the one before it, and a row for each run."""

import json
import math

import pytest

from steer_heal.errors import UserError
from steer_heal.runs.events import (
    EventLog,
    append_result,
    broken_link,
    last_hash,
    line_hash,
    new_run_folder,
    read_events,
    read_results,
)


@pytest.fixture
def log(tmp_path):
    """Three events in tmp_path."""
    log = EventLog(tmp_path)
    for stage in ("run_start", "base", "round"):
        log.write(stage, 0, x=1)
    return log


def test_runs_of_one_second_get_folders_of_their_own_in_the_folder_that_was_given(tmp_path):
    folders = [new_run_folder(tmp_path / "new", "../../x y") for _ in range(5)]
    assert len({*folders}) == 5 and all(f.is_dir() and f.parent == tmp_path / "new" for f in folders)


def test_an_event_is_one_whole_line_on_disk_when_write_returns(tmp_path):
    log = EventLog(tmp_path)
    log.write("base", -1, text="a\nb\u2028c \ud800 \x00 😀")
    (event,) = read_events(tmp_path)  # nothing was closed
    assert (event["stage"], event["round"], event["text"]) == ("base", -1, "a\nb\u2028c \ud800 \x00 😀")
    log.write("round", 0)
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 2
    assert read_events(tmp_path)[1]["wall_s"] >= event["wall_s"]


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path):
    event = EventLog(tmp_path).write("heal", 0, x=math.nan, y=[math.inf, 1.0])
    assert (event["x"], event["y"], event["n_nonfinite"]) == (None, [None, 1.0], 2)
    json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_chain_goes_on_after_a_stop_and_any_change_breaks_it(log, tmp_path):
    log.close()
    EventLog(tmp_path).write("run_end", None)
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert broken_link(lines) is None and line_hash(lines[-1]) == last_hash(tmp_path)
    assert broken_link(lines[:-1]) is None, "the end of a chain is held by results.tsv alone"
    assert broken_link([lines[0], lines[1].replace(b'"x": 1', b'"x": 2'), *lines[2:]]) == 2
    assert broken_link([lines[0], *lines[2:]]) == 1
    assert broken_link(lines[1:]) == 0
    assert broken_link([lines[0], lines[2], lines[1], lines[3]]) == 1
    assert broken_link([*lines, lines[-1]]) == 4


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(log, tmp_path):
    path = tmp_path / "events.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [e["stage"] for e in read_events(tmp_path)] == ["run_start", "base"]
    path.write_text("{torn\n" + whole)
    with pytest.raises(UserError, match="line 1 is not an event"):
        read_events(tmp_path)


@pytest.mark.parametrize(
    "line, told",
    [
        ("[]", "it is a JSON list, not an object"),
        ("3", "it is a JSON int"),
        ('{"round": 0}', "its stage is None"),
        ('{"stage": "gen"}', "its round is None"),
        ('{"stage": "gen", "round": "../../x"}', "its round is '../../x'"),
        ('{"stage": "gen", "round": true}', "its round is True"),
        ("[" * 100_000, "recursion"),
        ("\ufffe", "line 2 is not an event"),
    ],
)
def test_a_line_that_is_no_event_is_named(line, told, tmp_path):
    around = '{"stage": "base", "round": -1}\n'
    (tmp_path / "events.jsonl").write_text(around + line + "\n" + around, encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not an event") as error:
        read_events(tmp_path)
    assert told in str(error.value)


def test_a_folder_without_events_is_one_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="has no events.jsonl; give a run folder"):
            read_events(folder)


# --- results.tsv -------------------------------------------------------------------------------------------------
def test_a_run_has_one_row_and_new_columns_leave_older_rows_empty(tmp_path):
    rows = ({"run": "a", "shift": -0.5}, {"run": "b", "shift": None, "oracle": 0.9}, {"run": "a", "shift": 2})
    for row in rows:
        append_result(tmp_path, row)
    lines = (tmp_path / "results.tsv").read_text().splitlines()
    assert lines == ["run\tshift\toracle", "a\t-0.5\t", "b\t\t0.9"]


@pytest.mark.parametrize("arm", ["a\x1b[31mb", "\x1b]0;title\x07", "a\tb", "a\r\nb", "\u202eb", "\x00\ud800"])
def test_no_label_can_break_the_table_or_control_a_terminal(arm, tmp_path):
    append_result(tmp_path, {"run": "a", "arm": arm, "last": "z"})
    text = (tmp_path / "results.tsv").read_text(encoding="utf-8")
    assert all(c in "\t\n" or c.isprintable() for c in text)
    assert [(row["run"], row["last"]) for row in read_results(tmp_path / "results.tsv")] == [("a", "z")]

import json
import math
import re

import pytest

from steer_heal.events import EventLog, append_result, new_run_folder, read_events
from steer_heal.records import UserError


def test_two_runs_in_one_second_get_folders_of_their_own(tmp_path):
    folders = [new_run_folder(tmp_path, "toy-authority-s42") for _ in range(5)]
    assert len({f.name for f in folders}) == 5 and all(f.is_dir() for f in folders)


def test_a_slug_cannot_leave_the_folder(tmp_path):
    assert new_run_folder(tmp_path, "../../x y").parent == tmp_path


def test_events_are_one_object_a_line_without_blank_lines(tmp_path):
    log = EventLog(tmp_path)
    log.write("base", -1, metrics={"auth_nats": -1.5}, text="a\nb\u2028c \ud800 \x00 😀")
    log.write("round", 0)
    raw = (tmp_path / "events.jsonl").read_bytes()
    assert raw.count(b"\n") == 2 and b"\n\n" not in raw
    first, second = read_events(tmp_path)
    assert first["text"] == "a\nb\u2028c \ud800 \x00 😀"
    assert {"schema", "stage", "round", "t", "wall_s"} <= second.keys() and second["wall_s"] >= first["wall_s"]


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path):
    EventLog(tmp_path).write("heal", 0, x=math.nan, y=[math.inf, 1.0])
    event = read_events(tmp_path)[0]
    assert event["x"] is None and event["y"] == [None, 1.0] and event["n_nonfinite"] == 2
    json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_an_event_is_on_disk_when_write_returns(tmp_path):
    log = EventLog(tmp_path)
    log.write("base", -1)
    assert len(read_events(tmp_path)) == 1  # nothing was closed or flushed by the reader


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path):
    log = EventLog(tmp_path)
    log.write("base", -1)
    log.write("round", 0)
    path = tmp_path / "events.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [e["stage"] for e in read_events(tmp_path)] == ["base"]
    path.write_text("{torn\n" + whole)
    with pytest.raises(UserError, match="line 1 is not an event"):
        read_events(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[]", "it is a JSON list, not an object"),
        ("3", "it is a JSON int"),
        ('{"round": 0}', "its stage is None"),
        ('{"stage": "gen"}', "its round is None"),
        ('{"stage": "gen", "round": "../../x"}', "its round is '../../x'"),
        ('{"stage": "gen", "round": true}', "its round is True"),
        ("[" * 100_000, "recursion"),
        ("\ufffe", "not an event"),
    ],
)
def test_a_line_that_is_no_event_is_named(line, message, tmp_path):
    (tmp_path / "events.jsonl").write_text(
        '{"stage": "base", "round": -1}\n' + line + '\n{"stage": "round", "round": 0}\n', encoding="utf-8"
    )
    with pytest.raises(
        UserError, match=f"line 2 is not an event .*{re.escape(message)}|line 2 is {re.escape(message)}"
    ):
        read_events(tmp_path)


def test_a_folder_without_events_is_one_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="has no events.jsonl; give a run folder"):
            read_events(folder)


def test_results_keep_their_header_in_step_with_new_columns(tmp_path):
    append_result(tmp_path, {"run": "a", "shift": -0.5})
    append_result(tmp_path, {"run": "b", "shift": None, "oracle": 0.9})
    lines = (tmp_path / "results.tsv").read_text().splitlines()
    assert lines == ["run\tshift\toracle", "a\t-0.5\t", "b\t\t0.9"]

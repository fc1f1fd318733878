"""The record of a run: one JSON object a line, each linked to the one before it, and a row for each run."""

import json
import math
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import get_args

import pytest

from steer_heal.errors import UserError
from steer_heal.events import (
    AnyEvent,
    Dropped,
    Gathered,
    HealRetried,
    HealStepped,
    Measured,
    Run,
    RunEnd,
    decode,
    encode,
)
from steer_heal.records import Answer, Collected, Completion, DoseProbe, HealStep, Scored
from steer_heal.runs.begin import new_run_folder
from steer_heal.runs.log import EventLog, broken_link, last_hash, line_hash, read_events
from steer_heal.runs.results import append_result, read_results

INF, NAN = math.inf, math.nan
STEP = HealStep(step=0, epoch=0.1, lr=1e-3, fit=1.0, divergence=0.1, barrier=0.0, pressure=None)


def measured(state="base", r=None, text="yes", **metrics):
    answer = Answer(prompt="p", text=text, scores={"loop": -INF}, failed=("loop",), reasons=())
    items = {"ppl": [1.0, INF, NAN]}
    return Measured(round=r, state=state, metrics={"x": 1.0, "none": None, **metrics}, items=items, texts=(answer,))


def again(event):
    return decode(json.dumps(encode(event, "0" * 64), allow_nan=False))


@pytest.fixture
def log(tmp_path):
    """Three events in tmp_path."""
    log = EventLog(tmp_path)
    for r in range(3):
        log.write(measured("healed", r))
    return log


def same(a, b) -> bool:
    """Equality in which NaN equals NaN."""
    return str(a) == str(b)


# --- the codec ---------------------------------------------------------------------------------------------------
def test_every_field_of_an_event_comes_back_numbers_that_are_not_finite_among_them():
    text = Completion(0, "p", (1, 2), (3,), "t", 1.0, 0.5, 7)
    scored = tuple(Scored(text, {"spike": score, "relevance": -score}, (), ()) for score in (INF, 1.5, NAN))
    found = Collected(
        scored=scored, train=(2, 1), kappa=0.7, probes=(DoseProbe(0.7, 3, 2),), dose=0.7, rehearsal=(text,)
    )
    for event in (measured("healed", 3), Gathered(round=None, mode="none", collected=found), HealStepped(step=STEP)):
        assert same(again(event), event) and type(again(event)) is type(event)


def test_a_run_made_before_a_setting_was_added_is_read(one):
    from runs import recorded

    start = recorded(one)[0]
    del start["config"]["heal"]["rehearsal"], start["config"]["top_p"]
    assert decode(json.dumps(start)).config.heal.rehearsal == 0


def test_every_kind_has_a_name_of_its_own_and_only_typed_fields():
    kinds = get_args(AnyEvent)
    names = [next(each.default for each in fields(kind) if each.name == "event") for kind in kinds]
    assert len({*names}) == len(kinds) and MISSING not in names
    assert all(is_dataclass(kind) and "Any" not in str(kind.__annotations__) for kind in kinds)


@pytest.mark.parametrize(
    "line, told",
    [
        ("[]", "it must be a table of named values"),
        ('{"round": 0}', "event"),
        ('{"event": "measured", "round": "../../x"}', "measured.round is '../../x'"),
        ("[" * 100_000, "recursion"),
        ("\ufffe", "line 2 is not an event"),
    ],
)
def test_a_line_that_is_no_event_is_named(line, told, tmp_path):
    around = json.dumps(encode(measured(), "")) + "\n"
    (tmp_path / "events.jsonl").write_text(around + line + "\n" + around, encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not an event") as error:
        read_events(tmp_path)
    assert told in str(error.value)


# --- a run as its events -----------------------------------------------------------------------------------------
def test_what_a_later_event_makes_void_is_left_out():
    run = Run([measured(), measured("healed", 0), measured("steered", 1), measured("healed", 1)])
    for r in (0, 1):
        run.add(HealStepped(round=r, step=STEP))
    run.add(HealRetried(round=1, step=0, prompt_index=None, text="", lr=1e-4, error="nan"))
    assert [step.round for step in run.steps] == [0] and run.measured("healed", 1) is not None
    run.add(HealStepped(round=1, step=STEP))
    dropped = Dropped(round=1, past=("x",), dose=0.5, lr=1e-3, metrics={}, next_kappa=0.2, next_lr_share=1.0)
    run.add(dropped)
    assert [step.round for step in run.steps] == [0] and run.measured("healed", 1) is None
    assert run.at(Dropped, 1) == dropped and run.at(HealRetried, 1) is None
    assert run.measured("healed", 0) is not None and run.measured("base") is not None
    run.add(replace(dropped, past=("y",)))
    assert [each.past for each in run.each(Dropped)] == [("x",), ("y",)], "attempts are counted"


def test_subscribers_see_every_event_in_order_after_it_is_recorded():
    run, seen = Run(), []
    run.subscribers.append(lambda event: seen.append((event, len(run.events))))
    for r in range(3):
        run.add(measured("healed", r))
    assert [(event.round, n) for event, n in seen] == [(0, 1), (1, 2), (2, 3)]


# --- the log -----------------------------------------------------------------------------------------------------
def test_runs_of_one_second_get_folders_of_their_own_in_the_folder_that_was_given(tmp_path):
    folders = [new_run_folder(tmp_path / "new", "../../x y") for _ in range(5)]
    assert len({*folders}) == 5 and all(f.is_dir() and f.parent == tmp_path / "new" for f in folders)


def test_an_event_is_one_whole_line_on_disk_when_write_returns(tmp_path):
    log = EventLog(tmp_path)
    log.write(measured(text="a\nb\u2028c \ud800 \x00 😀"))
    (event,) = read_events(tmp_path)  # nothing was closed
    assert event.texts[0].text == "a\nb\u2028c \ufffd \x00 😀" and event.t
    log.write(measured("healed", 0))
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 2
    assert read_events(tmp_path)[1].wall_s >= event.wall_s
    json.loads((tmp_path / "events.jsonl").read_bytes().split(b"\n")[0], parse_constant=lambda name: pytest.fail(name))


def test_the_chain_goes_on_after_a_stop_and_any_change_breaks_it(log, tmp_path):
    log.close()
    EventLog(tmp_path).write(RunEnd())
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
    assert [e.round for e in read_events(tmp_path)] == [0, 1]
    path.write_text("{torn\n" + whole)
    with pytest.raises(UserError, match="line 1 is not an event"):
        read_events(tmp_path)


def test_a_folder_without_events_is_one_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="has no events.jsonl; give a run folder"):
            read_events(folder)


# --- results.tsv -------------------------------------------------------------------------------------------------
def test_a_run_has_one_row_and_new_columns_leave_older_rows_empty(tmp_path):
    first = {"run": "a", "shift": -0.5, "last_hash": "0"}
    rows = (first | {"old": 1}, first, {"run": "b", "shift": None, "oracle": 0.9}, {"run": "a", "last_hash": "1"})
    for row in rows:
        append_result(tmp_path, row)
    lines = (tmp_path / "results.tsv").read_text().splitlines()
    assert lines == ["run\tshift\tlast_hash\told\toracle", "a\t\t1\t\t", "b\t\t\t\t0.9"]


@pytest.mark.parametrize(
    "arm", ["a\x1b[31mb", "\x1b]0;title\x07", "a\tb", "a\r\nb", "\u202eb", "\x00\ud800\x0b\u2028\x85"]
)
def test_no_label_can_break_the_table_or_control_a_terminal(arm, tmp_path):
    append_result(tmp_path, {"run": "a", "arm": arm, "last": "z"})
    text = (tmp_path / "results.tsv").read_text(encoding="utf-8")
    assert all(c in "\t\n" or c.isprintable() for c in text)
    assert [(row["run"], row["last"]) for row in read_results(tmp_path / "results.tsv")] == [("a", "z")]


def test_what_is_not_text_in_the_table_is_kept(tmp_path):
    (tmp_path / "results.tsv").write_bytes(b"run\tarm\na\t\xff\xfe\n\n")
    append_result(tmp_path, {"run": "b", "arm": "c"})
    assert (tmp_path / "results.tsv").read_bytes() == b"run\tarm\na\t\xff\xfe\nb\tc\n"


def test_spec_lists_the_events_as_the_classes_are():
    from events_table import SPEC, with_table

    spec = SPEC.read_text(encoding="utf-8")
    assert with_table(spec) == spec, "run scripts/events_table.py"

"""A run that was stopped, at any moment and however often, ends as if it had never stopped."""

import pytest
from runs import Killed, assert_same, killing, resumed, started

import steer_heal.session as session_module
from steer_heal import steering
from steer_heal.compare import weights
from steer_heal.events import EventLog, append_result, of_stage, read_events, read_results
from steer_heal.records import UserError
from steer_heal.resume import partial, reopen
from steer_heal.run import main
from steer_heal.session import Session
from steer_heal.stages.bake import Student
from steer_heal.stages.partial import HealFile, TokenTape, steps_saved

pytestmark = pytest.mark.usefixtures("quick")


def test_killed_after_every_single_event(settings, two, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "write", dying(Session.write))
    run, n_lives = started(tmp_path, settings, "--n-rounds", "2", "--no-control"), 1
    while not read_results(tmp_path / "results.tsv"):
        try:
            main(["--resume", str(run), "--quiet"])
        except Killed:
            n_lives += 1
        assert n_lives < 40
    assert n_lives == len([e for e in read_events(run) if e["stage"] not in ("heal_step", "dose", "adapter_gen")])
    assert_same(run, two)


def dying(write):
    def deadly(self, stage, round_, **fields):
        write(self, stage, round_, **fields)
        if stage not in ("dose", "adapter_gen"):  # taken back on resuming, as the event after them was not written
            raise Killed

    return deadly


@pytest.mark.parametrize("stage, r", [("control_gen", -1), ("dose", 0), ("adapter_gen", 0)])
def test_killed_after_one_event(stage, r, settings, one, tmp_path, monkeypatch):
    on = [(e["stage"], e["round"]) for e in read_events(one)].index((stage, r))
    with monkeypatch.context() as patch:
        killing(patch, EventLog, "write", on)
        run = started(tmp_path, settings, "--n-rounds", "1")
    assert_same(resumed(run), one)


def test_a_calibrated_dose_is_not_searched_again(settings, tmp_path, monkeypatch):
    flags = [
        "--n-rounds",
        "1",
        "--no-control",
        "--dose.mode",
        "iso_kl",
        "--dose.kl-target",
        "0.05",
        "--dose.kl-tokens",
        "2",
        "--gen.n-prompts",
        "2",
    ]
    whole = started(tmp_path / "whole", settings, *flags)
    on = [e["stage"] for e in read_events(whole)].index("calibration")
    with monkeypatch.context() as patch:
        killing(patch, EventLog, "write", on)
        run = started(tmp_path / "killed", settings, *flags)
    monkeypatch.setattr(session_module, "iso_kl_dose", lambda *args: pytest.fail("searched again"))
    assert_same(resumed(run), whole)


def test_killed_between_decode_batches(settings, one, tmp_path, monkeypatch):
    """Batches that were decoded are not decoded again, and the torn end of the tape is."""
    with monkeypatch.context() as patch:
        killing(patch, TokenTape, "__call__", 9)
        run = started(tmp_path, settings, "--n-rounds", "1")
    tape = partial(run, "gen", 0)
    n_recorded = len(tape.read_text().splitlines())
    assert n_recorded >= 2
    with tape.open("a") as file:
        file.write("[[1, 2")
    replayed = TokenTape(tape)
    assert len(replayed._recorded) == n_recorded
    replayed.close()
    with monkeypatch.context() as patch:
        asked = killing(patch, TokenTape, "__call__", -1)
        decoded = killing(patch, steering, "_decode_batch", -1)
        resumed(run)
    n_evaluated = 2 * 2  # steered and healed: thoughts and texts, a batch each
    assert len(decoded) - n_evaluated == len(asked) - n_recorded > 0
    assert_same(run, one)


def test_the_tape_hands_out_what_was_decoded_and_then_decodes(tmp_path):
    first = TokenTape(tmp_path / "tape.jsonl")
    assert [first(lambda: [(1, 2), ()]), first(lambda: [(3,)])] == [[(1, 2), ()], [(3,)]]
    first.close()
    second = TokenTape(tmp_path / "tape.jsonl")
    never = lambda: pytest.fail("decoded again")
    assert [second(never), second(never), second(lambda: [(4,)])] == [[(1, 2), ()], [(3,)], [(4,)]]


def test_the_rest_of_a_generation_may_take_other_batches(settings, two, tmp_path, monkeypatch):
    """Batch sizes are no part of what a run is: asked for differently, it ends in the same texts."""
    with monkeypatch.context() as patch:
        killing(patch, TokenTape, "__call__", 1)  # batches of 4
        run = started(tmp_path, settings, "--n-rounds", "2", "--no-control")
    n_recorded = len(partial(run, "gen", 0).read_text().splitlines())
    batches = killing(monkeypatch, steering, "_decode_batch", -1)
    assert (
        main(["fast-dev", "--resume", str(run), *settings, "--n-rounds", "2", "--no-control", "--gen.batch-size", "7"])
        == 0
    )
    assert n_recorded == 2 and max(len(rows) for _, rows, _, _ in batches) == 7
    texts = lambda folder: [
        row["completion_ids"] for e in of_stage(read_events(folder), "gen") for row in e["completions"]
    ]
    assert texts(run) == texts(two)


@pytest.mark.parametrize("every_s, r, step", [(0.0, 1, 3), (3600.0, 0, 3)])
def test_killed_between_heal_steps(every_s, r, step, settings, two, tmp_path, monkeypatch):
    on = next(
        i for i, e in enumerate(read_events(two)) if e["stage"] == "heal_step" and (e["round"], e["step"]) == (r, step)
    )
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save_every_s", every_s)
        killing(patch, EventLog, "write", on)
        run = started(tmp_path, settings, "--n-rounds", "2", "--no-control")
    behind = step if every_s == 0 else 0  # the killed step itself was not saved
    assert steps_saved(partial(run, "heal", r)) == behind
    with monkeypatch.context() as patch:
        steps = killing(patch, HealFile, "save", -1)
        resumed(run)
    n_steps = [e["n_steps"] for e in of_stage(read_events(two), "heal")]
    assert len(steps) == sum(n_steps[r:]) - behind
    assert_same(run, two)


def test_killed_in_the_control_s_heal(settings, one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save_every_s", 0.0)
        killing(patch, HealFile, "save", 2)
        run = started(tmp_path, settings, "--n-rounds", "1")
    assert steps_saved(partial(run, "control", -1)) == 3
    assert_same(resumed(run), one)


@pytest.mark.parametrize(
    "owner, name, when",
    [
        (Student, "save", "after"),
        (Student, "factors", "after"),
        (session_module, "append_result", "before"),
        (steering.Vector, "save", "after"),
    ],
)
def test_killed_between_a_file_and_its_event(owner, name, when, settings, one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = killing(patch, owner, name, 0, when)
        run = started(tmp_path, settings, "--n-rounds", "1")
    assert len(calls) == 1
    assert_same(resumed(run), one)


def test_a_torn_last_line_is_dropped(after_round_0, two, capsys):
    path = after_round_0 / "events.jsonl"
    path.write_text(path.read_text()[:-100])
    assert_same(resumed(after_round_0), two)
    assert "torn" in capsys.readouterr().err


def test_the_reason_of_a_stop_is_taken_back(after_round_0, two):
    log = EventLog(after_round_0)
    log.write("run_end", None, error="interrupted")
    log.close()
    assert_same(resumed(after_round_0), two)


def test_events_of_another_order_are_refused(after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert main(["--resume", str(after_round_0), "--quiet"]) == 1
    assert "'prompted' of round -1 where a run writes 'base'" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(after_round_0, settings, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    asked = [
        "fast-dev",
        "--resume",
        str(after_round_0),
        *settings,
        "--no-control",
        "--heal.lam",
        "0.75",
        "--arm",
        "other",
    ]
    assert main([*asked, "--n-rounds", "3"]) == 2
    printed = capsys.readouterr().err
    assert (
        "heal.lam was 0.1 and is now 0.75" in printed
        and "n_rounds was 2 and is now 3" in printed
        and "arm was" not in printed
    )
    assert (after_round_0 / "events.jsonl").read_bytes() == before


def test_a_changed_trait_is_refused(after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    path.write_text(path.read_text().replace('"positive": "', '"positive": "Once, ', 1))
    assert main(["--resume", str(after_round_0)]) == 2
    printed = capsys.readouterr().err
    assert "trait.positive was" in printed and "Once, " in printed


def test_the_run_s_own_settings_are_taken(after_round_0, settings, two):
    assert (
        main(
            ["fast-dev", "--resume", str(after_round_0), *settings, "--no-control", "--n-rounds", "2", "--arm", "other"]
        )
        == 0
    )
    assert_same(after_round_0, two)
    assert read_results(after_round_0.parent / "results.tsv")[0]["arm"] == "other"


def test_a_finished_run_says_so(one, capsys):
    before = weights(one), (one / "events.jsonl").read_bytes(), (one.parent / "results.tsv").read_bytes()
    assert main(["--resume", str(one)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == (weights(one), (one / "events.jsonl").read_bytes(), (one.parent / "results.tsv").read_bytes())


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, "null", '{"stage": "base", "round": -1}', "\ufffe"])
def test_a_file_that_does_not_begin_as_a_run_is_refused(content, tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text(content, encoding="utf-8")
    assert main(["--resume", str(tmp_path)]) == 2
    assert "does not begin with a run_start" in capsys.readouterr().err


@pytest.mark.parametrize(
    "last, word",
    [
        ('{"stage": "base", "round": -1}', "KeyError: 'wall_s'"),
        ('{"stage": "base", "round": -1, "wall_s": 1, "x": NaN}', "ValueError"),
    ],
)
def test_a_past_that_no_run_wrote_is_refused_and_left_alone(last, word, tmp_path):
    whole = '{"stage": "run_start", "round": null, "wall_s": 0}\n' + last + "\n"
    (tmp_path / "events.jsonl").write_text(whole)
    with pytest.raises(UserError, match=f"is not as this version of steer-heal writes it .{word}"):
        reopen(tmp_path, lambda path: 0)
    assert (tmp_path / "events.jsonl").read_text() == whole


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 2
    assert "does not begin with a run_start" in capsys.readouterr().err


def test_a_run_has_one_row(tmp_path):
    append_result(tmp_path, {"run": "a", "shift": 1})
    append_result(tmp_path, {"run": "a", "shift": 2})
    assert [row["shift"] for row in read_results(tmp_path / "results.tsv")] == ["1"]

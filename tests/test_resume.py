"""A run that was stopped, at any moment and however often, ends as if it had never stopped."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from compare import comparable, weights
from runs import Killed, assert_same, killing, of, poisoned, recorded, resumed, rewritten, started

from steer_heal.__main__ import main
from steer_heal.bench import Bench
from steer_heal.commands import run as run_command
from steer_heal.errors import UserError
from steer_heal.events import RunEnd
from steer_heal.inputs.files import DATA
from steer_heal.loop import Loop
from steer_heal.model import decode
from steer_heal.model import lm as lm_module
from steer_heal.model.steering import Vector
from steer_heal.model.student import Student
from steer_heal.records import HealStep
from steer_heal.runs import stored
from steer_heal.runs.log import EventLog
from steer_heal.runs.partial import WrittenTexts, heal_path, load_heal, save_heal, saved_steps, texts_path
from steer_heal.runs.results import read_results
from steer_heal.runs.verify import violations
from steer_heal.stages.heal import SavedHeal
from steer_heal.verdict import UNTRAINED

pytestmark = pytest.mark.usefixtures("quick")
ONE, TWO = ["--n-rounds", "1"], ["--n-rounds", "2", "--no-control"]
"""Flags of the fixtures of these names."""
FEW = ["--filter.n-keep", "8", "--eval.evals", "moral_foundations", "text_quality", "drift"]
"""Fewer texts and evals, where a run is not compared with one of the fixtures."""


# --- killed ------------------------------------------------------------------------------------------------------
def lethal_lines(whole, alike: bool) -> list[int]:
    """Numbers of the lines that kill: each kind of line between each two kinds of lines once or, with `alike`, every
    time. Of the steps of a heal, the first, the second, the third and the last. With KILLS=all, every line."""
    kinds, nth = [""], 0
    for event in recorded(whole):
        nth = nth + 1 if event["event"] == "heal_step" else 0
        kinds.append(event["event"] + "." * min(nth, 2))
    lethal = {}
    for i, between in enumerate(zip(kinds, kinds[1:], [*kinds[2:], ""], strict=False)):
        again = alike and between[1:] != ("heal_step..", "heal_step..")
        lethal.setdefault(i if again or "KILLS" in os.environ else between, i + 1)
    return [*lethal.values()]


def assert_survives(settings, out, whole, monkeypatch, alike=False):
    """Each lethal line is written for the first time by a process that then dies; the last one ends as `whole`."""
    monkeypatch.setattr(stored, "SAVE_EVERY_S", 0.0)
    write, lethal, died_at = EventLog.write, lethal_lines(whole, alike), []

    def deadly(self, event):
        written = write(self, event)
        now = sum(len(path.read_bytes().splitlines()) for path in out.glob("*/events.jsonl"))
        if now in lethal and now not in died_at:
            died_at.append(now)
            raise Killed
        return written

    monkeypatch.setattr(EventLog, "write", deadly)
    run = started(out, settings)
    while not read_results(out / "results.tsv"):
        with suppress(Killed):
            resumed(run)
    assert died_at == lethal
    assert {event["event"] for event in recorded(whole)} == {recorded(whole)[n - 1]["event"] for n in died_at}
    assert_same(run, whole)


def test_killed_after_every_line(settings, two, tmp_path, monkeypatch):
    assert_survives([*settings, *TWO], tmp_path, two, monkeypatch, alike=True)


def test_killed_after_every_line_where_all_heals_were_tried_twice(settings, tmp_path, monkeypatch):
    poisoned(monkeypatch)
    whole = started(tmp_path / "whole", settings, *ONE, *FEW)
    assert [e["round"] for e in of(recorded(whole), "heal_retried")] == [None, 0]
    assert_survives([*settings, *ONE, *FEW], tmp_path / "killed", whole, monkeypatch)


def test_killed_within_a_round_in_bfloat16(settings, tmp_path, monkeypatch):
    flags = [*settings, *ONE, *FEW, "--no-control", "--dtype", "bfloat16"]
    whole = started(tmp_path / "whole", flags)
    assert recorded(whole)[0]["weights"]["dtype"] == "bfloat16"
    monkeypatch.setattr(stored, "SAVE_EVERY_S", 0.0)
    run = None
    for owner, name, on in ((stored, "save_heal", 1), (Student, "bake", 0), (Student, "save", 0)):
        with monkeypatch.context() as dying:
            killing(dying, owner, name, on)
            with suppress(Killed):
                run = started(tmp_path / "killed", flags) if run is None else resumed(run)
    assert_same(resumed(run), whole)


def test_a_resumed_run_has_the_settings_of_one_that_was_not_stopped(settings, tmp_path, monkeypatch):
    """Its dtype is that of the first process, and not `auto`. A sweep tells arms by these settings."""
    flags = [*settings, *ONE, *FEW, "--no-control", "--dtype", "auto"]
    started(tmp_path / "whole", flags)
    with monkeypatch.context() as dying:
        killing(dying, Student, "bake", 0)
        with suppress(Killed):
            run = started(tmp_path / "killed", flags)
    resumed(run)
    one, other = (read_results(tmp_path / name / "results.tsv")[0] for name in ("whole", "killed"))
    assert one["settings"] == other["settings"] and one["shift"] == other["shift"]


def test_a_run_in_a_folder_of_its_own_goes_on_where_it_was_moved(settings, tmp_path, monkeypatch):
    place = tmp_path / "there" / "run"
    with monkeypatch.context() as dying, suppress(Killed):
        killing(dying, Student, "bake", 0)
        main(["run", "fast-dev", "--folder", str(place), *settings, *ONE, *FEW, "--no-control"])
    place.rename(tmp_path / "moved")
    place.parent.rmdir()
    place.parent.write_text("a file, so that the recorded folder cannot be made again")
    resumed(tmp_path / "moved")


def test_killed_between_a_file_and_its_event(settings, one, tmp_path, monkeypatch):
    """One process after another dies, each at another file."""
    monkeypatch.setattr(stored, "SAVE_EVERY_S", 0.0)
    run = None
    for owner, name, on, when in (
        (stored, "save_heal", 0, "after"),  # of the control
        (stored, "save_heal", 0, "before"),
        (Student, "bake", 0, "after"),
        (Student, "save", 0, "after"),
        (Vector, "save", 0, "after"),
        (stored, "save_heal", 6, "after"),  # of the round
        (Student, "save", 0, "before"),
        (run_command, "append_result", 0, "before"),
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


@pytest.mark.parametrize("save_every_s, n_saved", [(0.0, 4), (3600.0, 0)])
def test_a_heal_goes_on_after_the_last_step_that_was_saved(save_every_s, n_saved, settings, two, tmp_path, monkeypatch):
    steps = [e["event"] == "heal_step" and (e["round"], e["step"]["step"]) == (1, 4) for e in recorded(two)]
    on = steps.index(True)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "SAVE_EVERY_S", save_every_s)
        killing(patch, EventLog, "write", on)
        run = started(tmp_path, settings, *TWO)
    assert saved_steps(heal_path(run, 1)) == n_saved  # the killed step itself was not saved
    with monkeypatch.context() as patch:
        written = killing(patch, EventLog, "write", -1)
        resumed(run)
    n_steps = of(recorded(two), "trained")[-1]["n_steps"]
    assert len([event for _, event in written if event.event == "heal_step"]) == n_steps - n_saved
    assert_same(run, two)


@pytest.mark.parametrize("lost", ["the last line", "the checkpoint before"])
def test_saved_steps_do_not_outlive_what_they_follow_from(lost, settings, two, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stored, "SAVE_EVERY_S", 0.0)
        killing(patch, stored, "save_heal", 11)  # in the heal of round 2
        run = started(tmp_path, settings, *TWO)
    assert saved_steps(heal_path(run, 1)) == 4
    if lost == "the last line":
        path = run / "events.jsonl"
        path.write_text(path.read_text()[:-20])
    else:
        shutil.rmtree(run / "ckpt/r0")
    resumed(run)
    assert_same(run, two)


@pytest.mark.parametrize("picked, later", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_run_goes_on_in_the_dtype_that_it_began_in(picked, later, settings, tmp_path, monkeypatch):
    pick, asked, auto = lm_module.pick_dtype, [], picked

    def answer(dtype, *rest):
        asked.append(dtype)
        return (auto, "as this CPU likes it") if dtype == "auto" else pick(dtype, *rest)

    monkeypatch.setattr(lm_module, "pick_dtype", answer)
    with monkeypatch.context() as patch:
        killing(patch, EventLog, "write", 2)
        run = started(tmp_path, settings, "--dtype", "auto", *ONE)
    auto = later
    resumed(run)
    name = str(picked).removeprefix("torch.")
    start = recorded(run)[0]
    assert asked == ["auto", name] and start["weights"]["dtype"] == name
    assert start["config"]["dtype"] == "auto", "its row of results.tsv is that of a run that was never stopped"


# --- decoded batches ---------------------------------------------------------------------------------------------
def test_a_kill_between_decode_batches_costs_one_batch(settings, one, tmp_path, monkeypatch):
    """Of finished batches none is decoded again; a torn line counts as a batch that was not finished."""
    with monkeypatch.context() as patch:
        whole = killing(patch, decode, "_decode_batch", -1)
        started(tmp_path / "whole", settings, *ONE)
    decoded = killing(monkeypatch, decode, "_decode_batch", -1)
    with monkeypatch.context() as patch:
        killing(patch, WrittenTexts, "add", 9, "before")
        run = started(tmp_path / "killed", settings, *ONE)
    path = texts_path(run, 0)
    assert path.exists()
    with path.open("a") as file:
        file.write("[[1, [2, 3")
    assert_same(resumed(run), one)
    assert len(decoded) == len(whole) + 1


def test_the_rest_may_be_written_in_other_batches(settings, two, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killing(patch, WrittenTexts, "add", 1)  # batches of 4
        run = started(tmp_path, settings, *TWO)
    batches = killing(monkeypatch, decode, "_decode_batch", -1)
    assert_same(resumed(run, "--gen.batch-size", "7"), two)
    assert max(len(rows) for _, rows, *_ in batches) == 7


def test_written_texts_come_back_by_seed_and_dose_up_to_a_torn_line(kept, tmp_path):
    written = WrittenTexts(tmp_path / "texts.jsonl")
    written.add(kept[:2])
    written.add(kept[2:3])
    written.close()
    path = tmp_path / "texts.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = WrittenTexts(path)
    first, second = ({(row.seed, row.dose): row.completion_ids for row in rows} for rows in (kept[:2], kept[2:4]))
    assert again.known == [first]
    again.add(kept[2:4])
    again.close()
    assert WrittenTexts(path).known == [first, second]


def test_a_flipped_bit_in_the_texts_costs_their_batches_and_changes_no_text(settings, one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killing(patch, WrittenTexts, "add", 9)
        run = started(tmp_path, settings, "--n-rounds", "1")
    path = texts_path(run, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    at = lines[1].rindex(b"]]]") - 1
    lines[1] = lines[1][:at] + bytes([lines[1][at] ^ 1]) + lines[1][at + 1 :]  # another digit of a token's id
    json.loads(lines[1])
    path.write_bytes(b"".join(lines))
    assert len(WrittenTexts(path).known) == 1
    assert_same(resumed(run), one)


@pytest.mark.parametrize("line", ["[]", "{}", "null", '{"batch": [1], "sha256": null}', '{"batch": {}}', "[" * 99_999])
def test_texts_of_another_shape_are_left_out(line, kept, tmp_path):
    path = tmp_path / "texts.jsonl"
    written = WrittenTexts(path)
    written.add(kept[:2])
    written.close()
    whole = path.read_bytes()
    path.write_bytes(whole + line.encode() + b"\n")
    again = WrittenTexts(path)
    assert len(again.known) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["a bit of a tensor", "a digit of a step", "the shape of the steps"])
def test_a_saved_heal_that_was_changed_is_refused(damage, tmp_path):
    path = tmp_path / "heal-r0.safetensors"
    step = HealStep(step=0, epoch=0.5, lr=0.1, fit=1.0, divergence=0.0, barrier=0.0, pressure=None)
    save_heal(path, SavedHeal({"factor.0": torch.ones(3), "step.0": torch.tensor(1.0)}, (step,), ({"fit": 1.0},)))
    assert saved_steps(path) == 1 and torch.equal(load_heal(path).tensors["factor.0"], torch.ones(3))
    content = path.read_bytes()
    changed = {
        "a bit of a tensor": content[:-1] + bytes([content[-1] ^ 1]),
        "a digit of a step": content.replace(b'epoch\\": 0.5', b'epoch\\": 0.6'),
        "the shape of the steps": content.replace(b"[{", b"{[", 1),
    }[damage]
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"heal-r0.safetensors is damaged .*; delete it"):
        load_heal(path)


def test_a_calibrated_dose_is_not_searched_again(settings, tmp_path, monkeypatch):
    dose = ["--dose.mode", "iso_kl", "--dose.kl-target", "0.05", "--dose.kl-tokens", "2", "--gen.n-prompts", "2"]
    with monkeypatch.context() as patch:
        killing(patch, EventLog, "write", 4)
        run = started(tmp_path, settings, "--n-rounds", "1", "--no-control", *dose)
    found = recorded(run)[-1]
    assert found["event"] == "calibrated"
    monkeypatch.setattr(Bench, "calibrate", lambda *args: pytest.fail("searched again"))
    gathered = of(recorded(resumed(run)), "gathered")[0]
    assert gathered["collected"]["kappa"] == pytest.approx(found["calibration"]["dose"])


# --- the record --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["a torn line", "an error"])
def test_the_end_of_a_stopped_run_is_taken_back(end, after_round_0, two):
    log = EventLog(after_round_0)
    log.write(RunEnd(error="interrupted"))
    log.close()
    if end == "a torn line":
        path = after_round_0 / "events.jsonl"
        path.write_text(path.read_text()[:-9])
    assert_same(resumed(after_round_0), two)


def test_a_broken_chain_is_refused_by_its_line(after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    first, second, *rest = path.read_text().splitlines(keepends=True)
    edited = "".join([first, second.replace('"metrics": {', '"metrics": {"x": 1, '), *rest])
    path.write_text(edited)
    assert main(["resume", str(after_round_0), "--quiet"]) == 2
    assert "events.jsonl line 3 does not follow from the line before it" in capsys.readouterr().err
    assert path.read_text() == edited


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, "null", '{"event": "measured", "schema": 5}', "\ufffe"])
def test_a_folder_without_a_run_is_refused(content, tmp_path, capsys):
    path = tmp_path / "events.jsonl"
    if content:
        path.write_text(content, encoding="utf-8")
    assert main(["resume", str(tmp_path)]) == 2
    told = "events.jsonl " if content else "has no events.jsonl; give a run folder"
    assert told in capsys.readouterr().err and (not content or path.read_text(encoding="utf-8") == content)


def other_line_ends(content):
    return content.replace(b"\n", b"\r\n")


def a_lone_return(content):
    return content.replace(b": ", b":\r", 1)


def utf_16(content):
    return content.decode().encode("utf-16")


@pytest.mark.parametrize("command", ["resume", "verify", "report"])
@pytest.mark.parametrize("change", [other_line_ends, a_lone_return, utf_16])
def test_events_that_an_editor_saved_otherwise_are_one_error(change, command, after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    changed = change(path.read_bytes())
    path.write_bytes(changed)
    assert main([command, str(after_round_0)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(path) in told and path.read_bytes() == changed


PARTS = {
    "chat template": ("chat_template.jinja", lambda text: text.replace("\n{{ message", "\n {{ message")),
    "tokenizer": ("tokenizer.json", lambda text: text.replace('"&": 8', '"&": 9').replace('"\'": 9', '"\'": 8')),
    "config": ("config.json", lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')),
    "generation config": ("generation_config.json", lambda text: text.replace("{", '{"top_k": 7,', 1)),
}


def test_a_model_whose_other_parts_were_changed_is_named(settings, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(DATA / "toylm", tmp_path / "model")
    with monkeypatch.context() as patch:
        killing(patch, EventLog, "write", 0)
        run = started(tmp_path / "out", settings, "--model", str(model), *ONE)
    before = (run / "events.jsonl").read_bytes()
    assert {*recorded(run)[0]["weights"]["parts"]} == {name.replace(" ", "_") for name in PARTS}
    for part, (name, change) in PARTS.items():
        text = (model / name).read_text(encoding="utf-8")
        assert change(text) != text, name
        (model / name).write_text(change(text), encoding="utf-8")
        assert main(["resume", str(run), "--quiet"]) == 2
        told = f"the {part} of model {str(model)!r} were changed since the run began"
        assert told in capsys.readouterr().err
        assert main(["verify", str(run)]) == 1 and told in capsys.readouterr().out
        (model / name).write_text(text, encoding="utf-8")
    assert main(["verify", str(run)]) == 0 and (run / "events.jsonl").read_bytes() == before


def test_a_run_that_is_moved_while_it_runs_stops_and_goes_on_at_its_new_place(
    settings, two, tmp_path, monkeypatch, capsys
):
    work = Student.bake

    def moved(self):
        run = next(path for path in (tmp_path / "out").iterdir() if path.is_dir())
        run.rename(tmp_path / "new" / run.name)
        return work(self)

    (tmp_path / "new").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Student, "bake", moved)
        assert main(["run", "fast-dev", "--out", str(tmp_path / "out"), *settings, *TWO]) == 1
    told = capsys.readouterr().err
    assert "was moved or deleted while the run was going on" in told and told.count("\n") == 1
    (run,) = (tmp_path / "new").iterdir()
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert_same(resumed(run), two)


# --- flags -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", ["--heal.lam 0.75", "--seed 1", "--out x", "fast-dev"])
def test_other_settings_are_refused(flags, after_round_0, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    assert main(["resume", str(after_round_0), *flags.split()]) == 2
    assert flags.split()[0] in capsys.readouterr().err
    assert (after_round_0 / "events.jsonl").read_bytes() == before


def test_settings_without_effect_may_differ(after_round_0, two, tmp_path):
    """So may eval.batch_size, up to rounding."""
    flags = "--n-threads 1 --arm other --gen.batch-size 3 --heal.tokens-per-pass 4096"
    resumed(after_round_0, *flags.split())
    assert_same(after_round_0, two)
    assert read_results(tmp_path / "results.tsv")[0]["arm"] == "other"


# --- finished ----------------------------------------------------------------------------------------------------
def test_a_finished_run_gets_the_row_that_it_lacks_and_is_left_alone_otherwise(settings, tmp_path, capsys):
    """Killed before its row; then an input is lost, which it needs no more."""
    contexts = tmp_path / "contexts.jsonl"
    contexts.write_bytes((DATA / "toylm/contexts.jsonl").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, run_command, "append_result", 0, "before")
        run = started(tmp_path / "out", settings, *ONE, "--steer.contexts", str(contexts))
    before = weights(run), (run / "events.jsonl").read_bytes()
    contexts.unlink()
    for _ in range(2):
        resumed(run)
        told = capsys.readouterr().out
        assert "is finished" in told and f"more rounds: steer-heal resume {run} --n-rounds 2\n" in told
        (row,) = read_results(run.parent / "results.tsv")
        assert row["run"] == run.name and violations(run) == []
        assert before == (weights(run), (run / "events.jsonl").read_bytes())


def test_a_finished_run_with_its_row_is_left_as_it_is_without_torch(copy):
    (copy / "report.html").write_text("as it was")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(copy.parent.rglob("*"))}
    code = "import sys; from steer_heal.__main__ import main; assert main(['resume', sys.argv[1]]) == 0"
    env = os.environ | {"BEARTYPE": "0"}
    argv = [sys.executable, "-c", f"{code}; assert not {{'torch', 'matplotlib'}} & {{*sys.modules}}", str(copy)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(copy.parent.rglob("*"))}
    assert after == before


# --- more rounds -------------------------------------------------------------------------------------------------
def without_ends(run):
    """The events of a run without its ends and extensions, and without the number of rounds."""
    events = [event for event in comparable(run) if event["event"] not in ("run_end", "extended")]
    events[0].pop("settings")
    events[0]["config"].pop("n_rounds")
    return events


def test_a_finished_run_goes_on_to_more_rounds_as_if_it_had_been_asked_for_them(settings, two, tmp_path, monkeypatch):
    """It is killed on the way, and verifiable all along."""
    run = started(tmp_path, settings, "--n-rounds", "1", "--no-control")
    assert read_results(tmp_path / "results.tsv")[0]["n_rounds"] == "1"
    with monkeypatch.context() as patch, suppress(Killed):
        killing(patch, Loop, "extract", 0)
        resumed(run, "--n-rounds", "2")
    assert of(recorded(run), "extended")[0]["n_rounds"] == 2 and violations(run) == []
    rewritten(broken := shutil.copytree(tmp_path, tmp_path.with_name("changed")) / run.name, lambda e: e.pop(-3), True)
    assert any("results.tsv" in line for line in violations(broken))
    resumed(run)
    assert without_ends(run) == without_ends(two) and weights(run) == weights(two) and violations(run) == []
    (row,) = read_results(tmp_path / "results.tsv")
    (want,) = read_results(two.parent / "results.tsv")
    changing = ("run", "last_hash", "wall_s")
    assert {k: v for k, v in row.items() if k not in changing} == {k: v for k, v in want.items() if k not in changing}
    after = (run / "events.jsonl").read_bytes()
    resumed(run)
    assert main(["run", "fast-dev", "--folder", str(run), *settings, "--n-rounds", "1", "--no-control"]) == 0
    assert (run / "events.jsonl").read_bytes() == after


def test_a_run_that_is_not_finished_or_ended_early_gets_no_more_rounds(after_round_0, two, copy, tmp_path, capsys):
    def ended(events):
        last = of(events, "round_done")[-1]
        facts = {name: last[name] for name in ("schema", "t", "wall_s", "prev", "round")}
        limits = {"past": ["made up"], "dose": 1.0, "lr": 1.0, "metrics": {}, "next_kappa": 1, "next_lr_share": 1}
        events[events.index(last)] = {**facts, "event": "dropped", **limits}

    rewritten(copy, ended)
    for run, n, told in (
        (after_round_0, 3, "is not finished; resume it without --n-rounds first"),
        (two, 1, "--n-rounds is 1: the run in"),
        (copy, 3, "the last intact round is 1: round 2 was dropped (made up)"),
    ):
        before = (run / "events.jsonl").read_bytes()
        assert main(["resume", str(run), "--n-rounds", str(n)]) == 2
        assert told in capsys.readouterr().err and (run / "events.jsonl").read_bytes() == before
    log = EventLog(after_round_0)
    log.write(RunEnd(error="too few texts", resumable=False))
    log.close()
    assert main(["resume", str(after_round_0), "--n-rounds", "3"]) == 2
    assert "cannot go on to more rounds: too few texts" in capsys.readouterr().err


def test_what_a_user_puts_beside_the_checkpoints_stays(two, tmp_path):
    run = shutil.copytree(two.parent, tmp_path / "out") / two.name
    own = [run / "ckpt" / name for name in ("r1_my_copy/x.txt", "ready_for_paper/x.txt", "r7/x.txt", "readme.txt")]
    half = run / "ckpt/.r1.part/x.txt"
    for path in (*own, half):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "out/results.tsv").unlink()  # as if it had been killed before its row
    resumed(run)
    assert all(path.read_text() == "mine" for path in own) and not half.parent.exists()


def test_a_folder_whose_name_no_cell_can_hold_has_one_row(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "a  b")
    for _ in range(2):
        resumed(run)
    assert [row["run"] for row in read_results(tmp_path / "results.tsv")] == ["a%20%20b"]
    assert violations(run) == []


# --- rounds that are dropped ---------------------------------------------------------------------------------------
def dropping(monkeypatch, *rounds):
    """The first attempt at these rounds counts as broken; at round 10, all do."""
    past = lambda self, r: ["made up"] if 9 in rounds or (r in rounds and not self._dropped(r)) else []
    monkeypatch.setattr(Loop, "_past_limits", past)


BACKTRACK = [*TWO, "--backtrack.retries", "2", "--dose.mode", "fixed", "--dose.kappa", "0.4"]
BACKTRACK += ["--heal.target", "distribution", "--heal.rehearsal", "4", *FEW]


def test_killed_after_every_line_where_rounds_are_dropped(settings, tmp_path, monkeypatch):
    dropping(monkeypatch, 0, 1)
    whole = started(tmp_path / "whole", settings, *BACKTRACK)
    events = recorded(whole)
    assert [e["round"] for e in of(events, "dropped")] == [0, 1]
    found = [(e["round"], e["collected"]["kappa"]) for e in of(events, "gathered")]
    assert found == [(0, 0.4), (0, 0.2), (1, 0.4), (1, 0.2)]
    assert violations(whole) == [] and stored.FolderRun.read(whole).rounds == [0, 1]
    assert_survives([*settings, *BACKTRACK], tmp_path / "killed", whole, monkeypatch)


def test_a_run_whose_round_stays_broken_ends_with_the_round_before(settings, tmp_path, monkeypatch, capsys):
    past = lambda self, r: ["made up"] if r == 1 else []
    monkeypatch.setattr(Loop, "_past_limits", past)
    run = started(tmp_path, settings, *BACKTRACK)
    events = recorded(run)
    assert [e["round"] for e in of(events, "dropped")] == [1, 1, 1]
    assert "the last intact round is 1: round 2 was dropped (made up)" in events[-1]["verdict"]
    assert {path.name for path in (run / "ckpt").iterdir()} == {"r0"} and violations(run) == []
    (row,) = read_results(tmp_path / "results.tsv")
    assert row["state"] == "healed round 1"
    monkeypatch.setattr(Loop, "_past_limits", lambda self, r: [])
    alone = started(tmp_path / "alone", settings, *BACKTRACK, "--n-rounds", "1")
    one, kept = (weights(each)["ckpt/r0/adapter_model.safetensors"] for each in (alone, run))
    assert one == kept


def test_a_run_of_which_no_round_is_whole_says_so(settings, tmp_path, monkeypatch, capsys):
    dropping(monkeypatch, 9)
    run = started(tmp_path, settings, *BACKTRACK)
    assert recorded(run)[-1]["verdict"].startswith(f"{UNTRAINED}; no round was kept")
    assert not list((run / "ckpt").iterdir())
    assert read_results(tmp_path / "results.tsv")[0]["verdict"].startswith("UNTRAINED")


HELD = (
    "--n-rounds 2 --no-control --heal.target distribution --heal.text own --heal.teacher contrast+vector "
    "--heal.contrast-kl 0.001 --heal.hold 0.4 --heal.divergence none --dose.mode fixed --dose.kappa 0.3"
)


def test_killed_after_every_line_where_a_contrast_teaches_texts_under_attacks(settings, tmp_path, monkeypatch):
    whole = started(tmp_path / "whole", settings, *HELD.split(), *FEW)
    events = recorded(whole)
    found = [event["found"] for event in of(events, "contrasted")]
    assert len(found) == 2 and all(each["kl"] == pytest.approx(0.001, rel=0.02) for each in found)
    assert all({row["completion"]["attack"] for row in e["collected"]["scored"]} > {""} for e in of(events, "gathered"))
    assert_survives([*settings, *HELD.split(), *FEW], tmp_path / "killed", whole, monkeypatch)

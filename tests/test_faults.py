"""Signals, full disks, damaged and edited files, second processes and losses that are not numbers: a run survives
them, or says what is wrong."""

import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import comparable, weights
from conftest import ADAPTER
from runs import FULL_LR, POISONED_STEP, assert_same, killing, of, poisoned, recorded, resumed, rewritten, started

from steer_heal.__main__ import main
from steer_heal.errors import UserError
from steer_heal.events import RunEnd
from steer_heal.inputs import traits
from steer_heal.inputs.files import DATA
from steer_heal.loop import Loop
from steer_heal.model.student import Student
from steer_heal.records import NotFinite
from steer_heal.runs import stored
from steer_heal.runs.log import EventLog, broken_link
from steer_heal.runs.partial import heal_path
from steer_heal.runs.storage import atomic_folder, atomic_write, lock_run, sync_folder
from steer_heal.stages import heal as heal_module

pytestmark = pytest.mark.usefixtures("quick")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- files that were damaged ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ckpt/r0/adapter_model.safetensors", "vectors/r0.safetensors"])
def test_a_damaged_file_is_named_and_a_lost_heal_is_done_again(name, after_round_0, two, capsys):
    path = after_round_0 / name
    flip(path)
    assert main(["resume", str(after_round_0), "--quiet"]) == 1
    assert f"{path} is damaged" in capsys.readouterr().err
    if "ckpt" in name:
        shutil.rmtree(path.parent)
    else:
        shutil.copy(two / name, path)
    assert_same(resumed(after_round_0), two)


def test_a_damaged_half_of_a_heal_is_named_and_the_heal_starts_again(settings, one, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(stored, "SAVE_EVERY_S", 0.0)
        killing(patch, EventLog, "write", 7)
        run = started(tmp_path, settings, "--n-rounds", "1")
    path = heal_path(run, None)
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["resume", str(run), "--quiet"]) in (1, 2)
    assert f"{path} is damaged" in capsys.readouterr().err
    path.unlink()
    assert_same(resumed(run), one)


# --- files that were edited ----------------------------------------------------------------------------------------
@pytest.fixture
def own_files(settings, tmp_path, monkeypatch):
    """(settings of a run that reads copies of all data files, those copies by setting)."""
    sources = {
        "gen.prompts": DATA / "toylm/prompts/authority.jsonl",
        "steer.contexts": DATA / "toylm/contexts.jsonl",
        "eval.instrument": DATA / "toylm/instrument.toml",
        "eval.likelihood": DATA / "instruments/likelihood.toml",
        "eval.everyday": DATA / "everyday.jsonl",
        "eval.attacks": DATA / "attacks/eval.toml",
        "eval.vignettes": settings[-1],
        "eval.pairs": DATA / "toylm/pairs/love.jsonl",
        "trait": DATA / "traits/authority.toml",
    }
    copies = {name: Path(shutil.copy(source, tmp_path)) for name, source in sources.items()}
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    flags = [word for name, path in list(copies.items())[:-1] for word in (f"--{name}", str(path))]
    return [*settings[:-2], *flags], copies


def edit(path):
    """Turns the rows of a file around, or changes a word of it."""
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text(
        "".join(lines[::-1]) if path.suffix == ".jsonl" else text.replace("You", "We").replace("harm", "hurt")
    )


def test_files_that_are_edited_while_it_runs_change_nothing_of_a_run(own_files, tmp_path, monkeypatch):
    own, copies = own_files
    flags = [*own, "--n-rounds", "2", "--no-control"]
    whole = started(tmp_path / "whole", flags)
    extract = Loop.extract

    def editing(self, r):
        for path in copies.values() if r == 0 else ():
            edit(path)
        return extract(self, r)

    monkeypatch.setattr(Loop, "extract", editing)
    run = started(tmp_path / "edited", flags)
    assert weights(run) == weights(whole) and comparable(run) == comparable(whole)


def test_a_run_does_not_go_on_with_edited_files(own_files, tmp_path, monkeypatch, capsys):
    own, copies = own_files
    with monkeypatch.context() as patch:
        killing(patch, EventLog, "write", 2)
        run = started(tmp_path / "out", own)
    before = (run / "events.jsonl").read_bytes()
    for name, path in copies.items():
        whole = path.read_bytes()
        edit(path)
        assert main(["resume", str(run), "--quiet"]) == 2
        named = "trait.positive" if name == "trait" else f"the file of {name} was changed"
        assert named in capsys.readouterr().err
        path.write_bytes(whole)
    assert (run / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change, told",
    [
        ({"sha256": "0" * 64}, "weights of model"),
        ({"dtype": "float16"}, "weights of model"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": ["float32"]}, "dtype"),
    ],
)
def test_a_run_does_not_go_on_with_other_weights(change, told, after_round_0, capsys):
    rewritten(after_round_0, lambda events: events[0]["weights"].update(change), chained=True)
    before = (after_round_0 / "events.jsonl").read_bytes()
    assert main(["resume", str(after_round_0), "--quiet"]) == 2
    assert told in capsys.readouterr().err and (after_round_0 / "events.jsonl").read_bytes() == before


# --- other processes, signals, disks -------------------------------------------------------------------------------
def test_a_second_process_is_kept_out(after_round_0, two, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    with lock_run(after_round_0):
        assert main(["resume", str(after_round_0), "--quiet"]) == 2
    assert "another process" in capsys.readouterr().err
    assert (after_round_0 / "events.jsonl").read_bytes() == before
    assert_same(resumed(after_round_0), two)


def stopped_in_native_code(_student):
    """It calls Python, and puts an error of its own in place of what was raised there."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize("bake", [lambda _: os.kill(os.getpid(), signal.SIGINT), stopped_in_native_code])
def test_ctrl_c_ends_with_130_and_signals_are_given_back(bake, settings, one, tmp_path, monkeypatch, capsys):
    write = EventLog.write

    def again(self, event):
        if isinstance(event, RunEnd):  # a second signal does not cut the end short
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, event)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Student, "bake", bake)
        patch.setattr(EventLog, "write", again)
        assert main(["run", "fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1"]) == 130
    run = next(path.parent for path in tmp_path.glob("*/events.jsonl"))
    assert recorded(run)[-1]["error"] == "interrupted" and f"resume {run}" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same(resumed(run), one)


def test_a_full_disk_hides_neither_the_error_nor_how_to_go_on(settings, tmp_path, monkeypatch, capsys):
    def fail(self, *_, **__):
        monkeypatch.setattr(EventLog, "write", full)
        raise UserError("the heal's loss is nan")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Loop, "measure", fail)
    assert main(["run", "fast-dev", "--out", str(tmp_path), *settings]) == 1
    printed = capsys.readouterr().err
    assert "loss is nan" in printed and "resume" in printed


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path):
    log, before = EventLog(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write(RunEnd())
    whole = (tmp_path / "events.jsonl").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))
        with pytest.raises(OSError):
            log.write(RunEnd(error="x" * 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "events.jsonl").read_bytes() == whole
    log.write(RunEnd())
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert len(lines) == 2 and broken_link(lines) is None


def test_a_renamed_file_and_folder_are_followed_by_their_folder_s_sync(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def watched(handle):
        synced.append(sorted(os.listdir(handle)) if os.path.isdir(f"/proc/self/fd/{handle}") else None)
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    with atomic_write(tmp_path / "file") as part:
        part.write_text("whole")
    assert synced == [None, ["file"]]
    with atomic_folder(tmp_path / "ckpt") as part:
        (part / "inner").write_text("whole")
    assert synced[2:] == [None, ["inner"], ["ckpt", "file"]]
    sync_folder(tmp_path / "nowhere")  # a platform that cannot is no error


@pytest.mark.parametrize("kind", [atomic_write, atomic_folder])
def test_what_an_error_leaves_unfinished_is_removed(kind, tmp_path):
    with pytest.raises(KeyboardInterrupt), kind(tmp_path / "model") as part:
        (part / "weights" if kind is atomic_folder else part).write_text("a part")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_any_command_with_one_word(monkeypatch, capsys):
    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("steer_heal.commands.report.main", stopped)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- losses that are not numbers -----------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_is_met_once_at_half_the_learning_rate(settings, tmp_path, monkeypatch):
    poisoned(monkeypatch)
    run = started(tmp_path, settings, "--n-rounds", "1", "--no-control")
    events = recorded(run)
    (retry,), (heal,), (gen,) = (of(events, kind) for kind in ("heal_retried", "trained", "gathered"))
    assert (retry["step"], retry["lr"], heal["lr"], heal["n_retries"]) == (POISONED_STEP, FULL_LR / 2, FULL_LR / 2, 1)
    rows = [gen["collected"]["scored"][i]["completion"] for i in gen["collected"]["train"]]
    named = [row for row in rows if row["prompt_index"] == retry["prompt_index"]]
    assert any(row["text"].strip().startswith(retry["text"].strip()) for row in named)
    assert len(of(events, "heal_step")) == heal["n_steps"] + POISONED_STEP
    steps = [event.step for event in stored.FolderRun.read(run).steps]
    assert [step.step for step in steps] == list(range(heal["n_steps"]))
    assert max(step.lr for step in steps) == FULL_LR / 2


def test_a_second_loss_that_is_not_finite_stops_with_the_step_the_sample_and_the_checkpoint(after_round_0, capsys):
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, always=True)
        assert main(["resume", str(after_round_0), "--quiet"]) == 1
    events, printed = recorded(after_round_0), capsys.readouterr().err
    (retry,) = of(events, "heal_retried")
    sample = f"at step {POISONED_STEP} of round 2, on an answer to prompt {retry['prompt_index']}"
    for words in (sample, repr(retry["text"]), "half the learning rate", "round 1 and those before it are kept"):
        assert words in events[-1]["error"] and words in printed
    resumed(after_round_0)
    heals = of(recorded(after_round_0), "trained")
    assert [(e["n_retries"], e["lr"]) for e in heals] == [(0, FULL_LR), (1, FULL_LR / 2)]


def test_a_gradient_that_is_not_finite_counts(tiny, kept, heal_cfg, monkeypatch):
    monkeypatch.setattr(heal_module.SpectralPenalty, "backward", lambda self: self.updates[0][1].grad.fill_(torch.inf))
    with pytest.raises(NotFinite) as error:
        heal_module.heal(Student(tiny, ADAPTER), kept, replace(heal_cfg, spectral=0.1), round_=0, seed=0)
    assert error.value.step == 0 and kept[error.value.prompt_index].text.startswith(error.value.text[:20])

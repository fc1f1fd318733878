"""Signals, full disks, damaged files, second processes and losses that are not numbers: a run survives them or says what is wrong."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runs import assert_same, killing, resumed, started, undrawn

from steer_heal.events import EventLog, heal_steps, of_stage, read_events
from steer_heal.files import ROOT, beside, sync_folder
from steer_heal.records import NotFinite, UserError
from steer_heal.resume import hold, partial
from steer_heal.run import main
from steer_heal.session import Session
from steer_heal.stages import heal as heal_module, passes as passes_module
from steer_heal.stages.bake import Student
from steer_heal.stages.partial import steps_saved

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    "name, mend", [("ckpt/r0/adapter_model.safetensors", "or delete"), ("vectors/r0.safetensors", "restore the file")]
)
def test_a_flipped_byte_is_named(name, mend, after_round_0, two, capsys):
    path = after_round_0 / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert main(["--resume", str(after_round_0), "--quiet"]) == 1
    printed = capsys.readouterr().err
    assert str(path) in printed and "checksum" in printed and mend in printed
    if "ckpt" in name:
        shutil.rmtree(path.parent)
        assert_same(resumed(after_round_0), two)


@pytest.mark.parametrize("fault", ["flipped byte", "torn"])
def test_what_a_heal_had_saved_does_not_outlive_the_events_it_follows(fault, settings, two, tmp_path, monkeypatch):
    """Killed in the heal of round 1 with steps on disk; then round 0 is healed again, or the last step's event is lost."""
    on = next(
        i for i, e in enumerate(read_events(two)) if e["stage"] == "heal_step" and (e["round"], e["step"]) == (1, 3)
    )
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save_every_s", 0.0)
        killing(patch, EventLog, "write", on, "before")
        run = started(tmp_path, settings, "--n-rounds", "2", "--no-control")
    assert steps_saved(partial(run, "heal", 1)) == 3
    if fault == "torn":
        path = run / "events.jsonl"
        path.write_text(path.read_text()[:-20])
    else:
        shutil.rmtree(run / "ckpt" / "r0")
    assert_same(resumed(run), two)


def test_a_second_process_is_kept_out(after_round_0, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    held = "import sys, pathlib; from steer_heal.resume import hold; lock = hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(after_round_0)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["--resume", str(after_round_0), "--quiet"]) == 1
        assert "another process" in capsys.readouterr().err
        other.kill()
    assert (after_round_0 / "events.jsonl").read_bytes() == before
    hold(after_round_0).close()  # a dead process holds nothing


UNDRAWN = "import sys, steer_heal.session as s; s.plot = s.report = lambda folder: None; from steer_heal.run import main; sys.exit(main())"


@pytest.mark.parametrize(
    "signum, status, at", [(signal.SIGTERM, 143, "control_gen"), (signal.SIGKILL, -9, "heal_step")]
)
def test_stopped_by_a_signal(signum, status, at, settings, one, tmp_path):
    command = [sys.executable, "-c", UNDRAWN, "fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        while process.poll() is None and not any(
            f'"stage": "{at}"' in path.read_text() for path in tmp_path.glob("*/events.jsonl")
        ):
            time.sleep(0.01)
        process.send_signal(signum)
        printed = process.stderr.read()
    run = next(path for path in tmp_path.iterdir() if (path / "events.jsonl").exists())
    assert process.returncode == status, printed
    assert status < 0 or f"--resume {run}" in printed and "Traceback" not in printed
    assert_same(resumed(run), one)


def test_ctrl_c_ends_with_130_and_signals_are_given_back(settings, one, tmp_path, monkeypatch, capsys):
    write = EventLog.write

    def again(self, stage, *args, **fields):
        if stage == "run_end":  # a second signal does not cut the end short
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, stage, *args, **fields)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Student, "bake", lambda self: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(EventLog, "write", again)
        assert main(["fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1"]) == 130
    run = next(path for path in tmp_path.iterdir() if (path / "events.jsonl").exists())
    assert read_events(run)[-1]["error"] == "interrupted" and f"--resume {run}" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same(resumed(run), one)


def test_a_full_disk_hides_neither_the_error_nor_how_to_go_on(settings, tmp_path, monkeypatch, capsys):
    def fail(self, *_, **__):
        monkeypatch.setattr(EventLog, "write", full)
        raise UserError("the heal's loss is nan")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Session, "measure", fail)
    assert main(["fast-dev", "--out", str(tmp_path), *settings]) == 1
    printed = capsys.readouterr().err
    assert "loss is nan" in printed and "--resume" in printed


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path):
    log, before = EventLog(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write("base", -1)
    whole = (tmp_path / "events.jsonl").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))
        with pytest.raises(OSError):
            log.write("prompted", -1, text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "events.jsonl").read_bytes() == whole
    log.write("prompted", -1)
    assert [e["stage"] for e in read_events(tmp_path)] == ["base", "prompted"]


# --- a loss that is not a number -----------------------------------------------------------------------------------
AT_STEP, FULL = 2, 1e-4


def poison(patch, always=False):
    """One completion's loss is NaN at one step: at the full learning rate, or at any."""
    losses, schedule, at = heal_module.losses, heal_module.schedule, {"step": -1, "bad": None}

    def watched(step, n_steps):
        at.update(step=step, bad=None)
        return schedule(step, n_steps)

    def poisoned(lm, batch, cfg, *states):
        sft, divergence = losses(lm, batch, cfg, *states)
        if at["step"] == AT_STEP and (always or cfg.lr == FULL):
            at["bad"] = at["bad"] or batch[-1].ids
            sft = sft * torch.tensor([float("nan") if sample.ids == at["bad"] else 1.0 for sample in batch])
        return sft, divergence

    patch.setattr(heal_module, "schedule", watched)
    for module in (heal_module, passes_module):
        patch.setattr(module, "losses", poisoned)


@pytest.fixture(scope="module")
def retried(settings, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, undrawn():
        poison(patch)
        return started(tmp_path_factory.mktemp("retried"), settings, "--n-rounds", "1")


def test_a_loss_that_is_not_finite_is_met_once_at_half_the_learning_rate(retried, one):
    events = read_events(retried)
    (control, retry), (heal,) = of_stage(events, "heal_retry"), of_stage(events, "heal")
    assert (control["round"], control["lr"], retry["round"]) == (-1, FULL / 2, 0)
    assert (retry["step"], retry["lr"], heal["lr"], heal["n_retries"]) == (AT_STEP, FULL / 2, FULL / 2, 1)
    told = next(
        row
        for row in of_stage(events, "gen")[0]["completions"]
        if row["train"] and row["text"].strip().startswith(retry["text"].strip())
    )
    assert told["prompt_index"] == retry["prompt_index"]
    assert len(of_stage(events, "heal_step")) == heal["n_steps"] + AT_STEP
    assert [e["step"] for e in heal_steps(events)] == list(range(heal["n_steps"]))
    assert max(e["lr"] for e in heal_steps(events)) == FULL / 2
    whole = of_stage(read_events(one), "heal")[0]
    assert (whole["lr"], whole["n_retries"]) == (FULL, 0)


@pytest.mark.parametrize(
    "stage, r, step",
    [
        ("heal_retry", -1, AT_STEP),
        ("control", -1, None),
        ("heal_step", 0, AT_STEP - 1),
        ("heal_retry", 0, AT_STEP),
        ("heal_step", 0, AT_STEP + 1),
    ],
)
def test_killed_around_a_heal_that_was_tried_twice(stage, r, step, retried, settings, tmp_path, monkeypatch):
    on = next(
        i for i, e in enumerate(read_events(retried)) if (e["stage"], e["round"], e.get("step")) == (stage, r, step)
    )
    poison(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save_every_s", 0.0)
        killing(patch, EventLog, "write", on)
        run = started(tmp_path, settings, "--n-rounds", "1")
    assert_same(resumed(run), retried)


def test_a_second_loss_that_is_not_finite_stops_with_the_step_the_sample_and_the_checkpoint(after_round_0, capsys):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, always=True)
        assert main(["--resume", str(after_round_0), "--quiet"]) == 1
    events, printed = read_events(after_round_0), capsys.readouterr().err
    (retry,) = of_stage(events, "heal_retry")
    assert "WARNING" not in printed and "healed again from its start, at learning rate 5e-05" in printed
    for words in (
        "loss is nan",
        f"at step {AT_STEP} of round 1",
        f"prompt {retry['prompt_index']}",
        repr(retry["text"]),
        "half the learning rate",
        "ckpt/r0 holds",
    ):
        assert words in events[-1]["error"] and words in printed
    resumed(after_round_0)
    heals = of_stage(read_events(after_round_0), "heal")
    assert [(e["n_retries"], e["lr"]) for e in heals] == [(0, FULL), (1, FULL / 2)]


def test_a_gradient_that_is_not_finite_counts(tiny, kept, heal_cfg, monkeypatch):
    monkeypatch.setattr(
        heal_module.SpectralPenalty, "backward", lambda self: self.updates[0][1].grad.fill_(float("inf"))
    )
    cfg = replace(heal_cfg, spectral=0.1)
    with pytest.raises(
        NotFinite, match="gradient's norm (nan|inf) at step 0 of round 0, on an answer to prompt . that begins"
    ):
        heal_module.heal(Student(tiny, cfg), kept, 0, cfg, seed=0)


# --- what is on disk ------------------------------------------------------------------------------------------------
def test_a_renamed_file_and_folder_are_followed_by_their_folder_s_sync(tmp_path, monkeypatch, with_history):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            synced.append(sorted(os.listdir(handle)) if os.path.isdir(f"/proc/self/fd/{handle}") else None),
            sync(handle),
        ),
    )
    with beside(tmp_path / "file") as part:
        part.write_text("whole")
    assert synced[-1] == ["file"]
    with_history.save(tmp_path / "ckpt", with_history.factors("history"))
    assert synced[-1] == ["ckpt", "file"] and "adapter_model.safetensors" in synced[-2]
    sync_folder(tmp_path / "nowhere")  # a platform that cannot is no error

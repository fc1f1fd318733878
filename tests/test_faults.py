"""Signals, full disks, damaged files, second processes and losses that are not numbers: a run survives them or says what is wrong."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from runs import assert_same, resumed

from steer_heal.events import EventLog, read_events
from steer_heal.files import ROOT
from steer_heal.records import UserError
from steer_heal.resume import hold
from steer_heal.run import main
from steer_heal.session import Session
from steer_heal.stages.bake import Student

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("name, mend", [("ckpt/r0/adapter_model.safetensors", "or delete"), ("vectors/r0.safetensors", "restore the file")])
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


def test_a_second_process_is_kept_out(after_round_0, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    held = "import sys, pathlib; from steer_heal.resume import hold; lock = hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", held, str(after_round_0)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["--resume", str(after_round_0), "--quiet"]) == 1
        assert "another process" in capsys.readouterr().err
        other.kill()
    assert (after_round_0 / "events.jsonl").read_bytes() == before
    hold(after_round_0).close()  # a dead process holds nothing


UNDRAWN = "import sys, steer_heal.session as s; s.plot = s.report = lambda folder: None; from steer_heal.run import main; sys.exit(main())"


@pytest.mark.parametrize("signum, status, at", [(signal.SIGTERM, 143, "control_gen"), (signal.SIGKILL, -9, "heal_step")])
def test_stopped_by_a_signal(signum, status, at, settings, one, tmp_path):
    command = [sys.executable, "-c", UNDRAWN, "fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        while process.poll() is None and not any(f'"stage": "{at}"' in path.read_text() for path in tmp_path.glob("*/events.jsonl")):
            time.sleep(0.01)
        process.send_signal(signum)
        printed = process.stderr.read()
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
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
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
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

"""A run that was stopped, at any moment and however often, ends as if it had never stopped."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import steer_heal.session as session_module
from steer_heal import steering
from steer_heal.events import EventLog, append_result, of_stage, read_events, read_results
from steer_heal.files import ROOT
from steer_heal.records import UserError
from steer_heal.resume import hold, partial, reopen
from steer_heal.run import main
from steer_heal.session import Session
from steer_heal.stages.bake import Student
from steer_heal.stages.partial import HealFile, TokenTape, steps_saved

VARIES = {"t", "wall_s", "seconds", "git_commit", "command", "folder"}
SETTINGS = [
    "--quiet", "--n-threads", "1", "--steer.n-contexts", "4", "--gen.max-new-tokens", "6", "--gen.batch-size", "4", "--eval.think-tokens", "1",
    "--eval.n-texts", "2", "--eval.n-prompts", "2", "--eval.max-new-tokens", "6", "--eval.n-bootstrap", "10", "--heal.spectral", "0.1",
]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No pictures, which are functions of the events; and threads as other tests expect them."""
    n_threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    patch.setattr(session_module, "plot", lambda folder: None)
    patch.setattr(session_module, "report", lambda folder: None)
    yield
    patch.undo()
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    vignettes = tmp_path_factory.mktemp("data") / "vignettes.jsonl"
    vignettes.write_text("".join((ROOT / "data/toylm/vignettes.jsonl").read_text().splitlines(keepends=True)[:3]))
    return [*SETTINGS, "--eval.vignettes", str(vignettes)]


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """One round and the control, never interrupted."""
    return started(tmp_path_factory.mktemp("one"), settings, "--n-rounds", "1")


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    """Two rounds without the control, never interrupted."""
    return started(tmp_path_factory.mktemp("two"), settings, "--n-rounds", "2", "--no-control")


def started(out, settings, *flags):
    try:
        assert main(["fast-dev", "--out", str(out), *settings, *flags]) == 0
    except Killed:
        pass
    return next(path for path in out.iterdir() if path.is_dir())


def resumed(run):
    assert main(["--resume", str(run), "--quiet"]) == 0
    return run


def story(run):
    events = read_events(run)
    events[0]["config"].pop("out")
    return [{key: value for key, value in event.items() if key not in VARIES} for event in events]


def adapters(run):
    return {str(path.relative_to(run)): path.read_bytes() for folder in ("ckpt", "vectors") for path in sorted((run / folder).rglob("*")) if path.is_file()}


def assert_same(run, uninterrupted):
    assert [(e["stage"], e["round"]) for e in story(run)] == [(e["stage"], e["round"]) for e in story(uninterrupted)]
    assert story(run) == story(uninterrupted)
    assert adapters(run) == adapters(uninterrupted) and len(adapters(run)) >= 4
    assert not (run / "partial").exists()
    assert [row["run"] for row in read_results(run.parent / "results.tsv")] == [run.name]


def killing(monkeypatch, owner, name, on, when="after"):
    """Patches a function so that its call number `on` (from 0) kills the run; returns the list of calls."""
    calls, work = [], getattr(owner, name)

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 == on and when == "before":
            raise Killed
        result = work(*args, **kwargs)
        if len(calls) - 1 == on:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)
    return calls


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
    flags = ["--n-rounds", "1", "--no-control", "--dose.mode", "iso_kl", "--dose.kl-target", "0.05", "--dose.kl-tokens", "2", "--gen.n-prompts", "2"]
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


@pytest.mark.parametrize("every_s, r, step", [(0.0, 1, 3), (3600.0, 0, 3)])
def test_killed_between_heal_steps(every_s, r, step, settings, two, tmp_path, monkeypatch):
    on = next(i for i, e in enumerate(read_events(two)) if e["stage"] == "heal_step" and (e["round"], e["step"]) == (r, step))
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


@pytest.mark.parametrize("owner, name, when", [
    (Student, "save", "after"), (Student, "factors", "after"), (session_module, "append_result", "before"), (steering.Vector, "save", "after"),
])
def test_killed_between_a_file_and_its_event(owner, name, when, settings, one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = killing(patch, owner, name, 0, when)
        run = started(tmp_path, settings, "--n-rounds", "1")
    assert len(calls) == 1
    assert_same(resumed(run), one)


@pytest.fixture
def after_round_0(two, tmp_path):
    """Two rounds, of which the second has only begun."""
    run = tmp_path / two.name
    shutil.copytree(two, run)
    lines = (two / "events.jsonl").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if json.loads(line)["stage"] == "gen" and json.loads(line)["round"] == 1)
    (run / "events.jsonl").write_text("".join(lines[: end + 1]))
    shutil.rmtree(run / "ckpt" / "r1")
    return run


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


def test_events_of_another_order_are_refused(after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert main(["--resume", str(after_round_0), "--quiet"]) == 1
    assert "'prompted' of round -1 where a run writes 'base'" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(after_round_0, settings, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    asked = ["fast-dev", "--resume", str(after_round_0), *settings, "--no-control", "--heal.lam", "0.75", "--arm", "other"]
    assert main([*asked, "--n-rounds", "3"]) == 2
    printed = capsys.readouterr().err
    assert "heal.lam was 0.1 and is now 0.75" in printed and "n_rounds was 2 and is now 3" in printed and "arm was" not in printed
    assert (after_round_0 / "events.jsonl").read_bytes() == before


def test_a_changed_trait_is_refused(after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    path.write_text(path.read_text().replace('"positive": "', '"positive": "Once, ', 1))
    assert main(["--resume", str(after_round_0)]) == 2
    printed = capsys.readouterr().err
    assert "trait.positive was" in printed and "Once, " in printed


def test_the_run_s_own_settings_are_taken(after_round_0, settings, two):
    assert main(["fast-dev", "--resume", str(after_round_0), *settings, "--no-control", "--n-rounds", "2", "--arm", "other"]) == 0
    assert_same(after_round_0, two)
    assert read_results(after_round_0.parent / "results.tsv")[0]["arm"] == "other"


def test_a_finished_run_says_so(one, capsys):
    before = adapters(one), (one / "events.jsonl").read_bytes(), (one.parent / "results.tsv").read_bytes()
    assert main(["--resume", str(one)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == (adapters(one), (one / "events.jsonl").read_bytes(), (one.parent / "results.tsv").read_bytes())


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, "null", '{"stage": "base", "round": -1}', "\ufffe"])
def test_a_file_that_does_not_begin_as_a_run_is_refused(content, tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text(content, encoding="utf-8")
    assert main(["--resume", str(tmp_path)]) == 2
    assert "does not begin with a run_start" in capsys.readouterr().err


@pytest.mark.parametrize("last, word", [
    ('{"stage": "base", "round": -1}', "KeyError: 'wall_s'"), ('{"stage": "heal_step", "round": 0}', "KeyError: 'step'"),
    ('{"stage": "heal_step", "round": 0, "step": "1"}', "TypeError"), ('{"stage": "base", "round": -1, "wall_s": 1, "x": NaN}', "ValueError"),
])
def test_a_past_that_no_run_wrote_is_refused_and_left_alone(last, word, tmp_path):
    whole = '{"stage": "run_start", "round": null, "wall_s": 0}\n' + last + "\n"
    (tmp_path / "events.jsonl").write_text(whole)
    with pytest.raises(UserError, match=f"is not as this version of steer-heal writes it .{word}"):
        reopen(tmp_path, lambda path: 0)
    assert (tmp_path / "events.jsonl").read_text() == whole


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 2
    assert "does not begin with a run_start" in capsys.readouterr().err


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


def test_a_run_has_one_row(tmp_path):
    append_result(tmp_path, {"run": "a", "shift": 1})
    append_result(tmp_path, {"run": "a", "shift": 2})
    assert [row["shift"] for row in read_results(tmp_path / "results.tsv")] == ["1"]

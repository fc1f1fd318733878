"""The way from the loop down to a decoded token is short; an interrupted write leaves a run that can go on."""

import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from runs import assert_same, of, recorded, resumed, started

import steer_heal
from steer_heal.__main__ import main
from steer_heal.check import check
from steer_heal.inputs.files import DATA
from steer_heal.model import decode
from steer_heal.model.device import device_name
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.report import console
from steer_heal.runs import storage
from steer_heal.runs.begin import begin, start_event
from steer_heal.runs.log import broken_link
from steer_heal.runs.stored import FolderRun

PACKAGE = Path(steer_heal.__file__).parent


def test_the_folder_of_a_run_is_named_by_the_stem_of_its_trait_file(tmp_path):
    (tmp_path / "mine.toml").write_text((DATA / "traits/love.toml").read_text())
    for trait, stem in ((f"{tmp_path}/mine.toml", "mine"), (f"{tmp_path}/mine.toml/inner", "mine-inner")):
        cfg = replace(FAST_DEV_PRESET, trait=trait, out=tmp_path / "out", quiet=True)
        _, run, lock = begin(cfg, check(cfg), "fast-dev", command=())
        run.close()
        lock.close()
        assert run.folder.name.endswith(f"_fast-dev-{stem}-s42") and run.folder.parent == tmp_path / "out"


def test_a_run_records_its_device_and_the_wording_of_every_item_that_it_measures(one):
    """A text stands beside its answer; pairs of an eval that is off are left out."""
    run = FolderRun.read(one)
    start, base = run.start, run.measured("base")
    assert start.device == device_name(torch.device("cpu"))
    inputs = check(start.config)
    n_items = {metric.of: len(base.items[metric.item]) for metric in start.metrics}
    assert {of: len(items) for of, items in start.wording.items()} | {"text": n_items["text"]} == n_items
    assert [scene for scene, _ in start.wording["vignette"]] == [vignette.text for vignette in inputs.vignettes]
    assert start.wording["pair"][0] == [*vars(inputs.pairs[0]).values()]
    few = replace(start.config, eval=replace(start.config.eval, evals=("moral_foundations",)))
    assert start_event(few, inputs).wording.keys() == {"vignette"}


def test_from_the_command_to_the_first_decoded_token_are_at_most_nine_functions(quick, settings, tmp_path, monkeypatch):
    stacks = []

    def watched(config):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names)
        return sampler(config)

    sampler = decode.sampler
    monkeypatch.setattr(decode, "sampler", watched)
    assert main(["run", "fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1", "--no-control"]) == 0
    ours = [[name for name in names[::-1] if not name.startswith("<")] for names in stacks]
    assert len(ours[0]) <= 9, ours[0]
    assert all(len(names) <= 12 for names in ours), max(ours, key=len)


def test_every_stage_has_a_bar_that_ends_full(quick, settings, tmp_path, monkeypatch):
    bars = {}

    class Recorded(console.Bar):
        @contextmanager
        def stage(self, stage, r, doing):
            self.seen = bars.setdefault((stage, r, doing), [])
            yield

        def part(self, n, n_parts, kind="eval"):
            self.seen.append(f"{n} of {n_parts}")

        def at(self, done, total):
            self.seen.append((done, total))

    monkeypatch.setattr(console, "Bar", Recorded)
    flags = ["--n-rounds", "1", "--dose.mode", "iso_kl", "--dose.kl-target", "0.01", "--gen.max-new-tokens", "8"]
    distil = ["--heal.target", "distribution", "--heal.text", "own"]
    run = started(tmp_path, settings, *flags, *distil)
    assert {doing for *_, doing in bars} == {
        *("measuring", "steered", "healed", "reading the vector", "calibrating the dose"),
        *("writing text", "healing", "reading what was learnt"),
    }
    for what, seen in bars.items():
        numbers = [each for each in seen if not isinstance(each, str)]
        assert all(0 <= done <= total for done, total in numbers), what
        assert numbers[-1][0] == numbers[-1][1] > 0, what
        if parts := [each for each in seen if isinstance(each, str)]:
            assert parts == [f"{i + 1} of 6" for i in range(6)], what
        if what[2] == "writing text":
            assert any(done % 1 for done, _ in numbers), "a text that is being written counts in part"
    for event in of(recorded(run), "trained"):
        seen = bars["heal", event["round"], "healing"]
        n = event["n_steps"]
        assert seen[-n:] == [(step + 1, n) for step in range(n)], "each step once, and nothing between them"


def test_off_a_terminal_a_stage_tells_once_a_minute_how_far_it_is(one, monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.logger, "info", lines.append)
    run = FolderRun.read(one)
    assert console.place("preflight", None, run) == "preflight"
    for quiet in (False, True):
        bar = console.Bar(run, quiet, file=StringIO())
        with bar.stage("healed", 0, "healed"):
            bar.part(2, 3)
            for second in range(0, 150, 10):
                now[0] = 1000.0 * quiet + second
                bar.at(second, 200)
    assert lines == [f"round 1 of 1: healed, eval 2 of 3, {n} of 200" for n in (60, 120)]


@pytest.mark.parametrize("kind", ["measured", "heal_step", "run_end"])
def test_a_signal_in_the_middle_of_writing_an_event_breaks_no_chain(kind, quick, one, settings, tmp_path, monkeypatch):
    """The event is on disk, but the call that writes it does not return."""
    sync, flags = os.fsync, ["run", "fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1"]

    def interrupted(handle):
        sync(handle)
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.name == "events.jsonl" and f'"event": "{kind}"' in path.read_text().splitlines()[-1]:
            patch.undo()
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", interrupted)
        assert main(flags) == 130
    folder = next(path for path in tmp_path.iterdir() if (path / "events.jsonl").exists())
    assert broken_link((folder / "events.jsonl").read_bytes().splitlines()) is None
    assert_same(resumed(folder), one)


def test_a_last_event_that_lacks_its_newline_alone_is_kept(quick, after_round_0, two):
    path = after_round_0 / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert_same(resumed(after_round_0), two)

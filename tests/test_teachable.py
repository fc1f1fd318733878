"""Is there anything to teach? The readings, the verdict, and a run that stops on it."""

import json
from dataclasses import replace

import pytest
from runs import SETTINGS

from steer_heal import teachable as module
from steer_heal.__main__ import main
from steer_heal.bench import Bench
from steer_heal.check import check
from steer_heal.evals.replies import pair_margins
from steer_heal.events import Measured, Preflight, decode, encode
from steer_heal.loop import Loop
from steer_heal.model.steering import Condition, Contrast
from steer_heal.model.student import Student
from steer_heal.presets import TOY_PRESET
from steer_heal.progress import Progress
from steer_heal.records import NOTHING, Teaching
from steer_heal.runs.log import read_events
from steer_heal.runs.stored import MemoryRun
from steer_heal.teachable import judged, teachable


def teaching(shift: float, low: float, high: float, halves=(0.1, 0.1), kl: float = 0.1) -> Teaching:
    return Teaching(name="", strength=1.0, kl=kl, shift=shift, low=low, high=high, right=0.9, halves=halves)


class Told(Progress):
    def __init__(self) -> None:
        self.parts = []

    def part(self, n, n_parts, kind="eval") -> None:
        self.parts.append((n, n_parts, kind))


@pytest.fixture
def bench(toy) -> Bench:
    return Bench(TOY_PRESET, check(TOY_PRESET), Student(toy, TOY_PRESET.adapter))


@pytest.fixture
def few(bench) -> Bench:
    """With six pairs."""
    return replace(bench, inputs=replace(bench.inputs, pairs=bench.inputs.pairs[:6]))


# --- readings ------------------------------------------------------------------------------------------------------
def test_the_contrast_is_read_as_the_eval_reads_it_at_the_strength_of_its_budget(bench: Bench, monkeypatch):
    asked, write = [], Bench.write
    monkeypatch.setattr(Bench, "write", lambda *args, **how: asked.append((len(args[2]), how)) or write(*args, **how))
    found = teachable(bench)
    assert asked == [(8, {"adapters": "base", "max_new_tokens": 48})], "the base's own text"
    trait, lm = bench.trait, bench.student.lm
    before = pair_margins(lm, bench.inputs.pairs, bench.plain)
    for each, budget in zip(found.contrasts, (0.03, 0.1, 0.3), strict=True):
        assert each.kl == pytest.approx(budget, rel=0.02)
        condition = Condition(trait.plain_system, contrast=Contrast(trait.positive, trait.negative, each.strength))
        changes = [a - b for a, b in zip(pair_margins(lm, bench.inputs.pairs, condition), before, strict=True)]
        assert each.shift == pytest.approx(sum(changes) / len(changes), abs=1e-4)
        assert each.right == sum(change > 0 for change in changes) / len(changes)
        halves = (changes[::2], changes[1::2])
        assert each.halves == pytest.approx([sum(half) / len(half) for half in halves], abs=1e-4)
    persona, opposite = found.personas
    assert persona.shift > 0.1 and opposite.shift < -0.1 and persona.strength is None
    assert len(found.null) == 7 + 10 and all(each.kl == pytest.approx(0.1, rel=0.02) for each in found.null)
    assert found.band == pytest.approx((sum(each.shift**2 for each in found.null) / 17) ** 0.5)
    assert found.verdict == "teachable"


def test_the_short_form_reads_one_budget_and_no_vectors(few: Bench):
    told = Told()
    found = teachable(few, short=True, progress=told)
    assert [each.kl for each in found.contrasts] == pytest.approx([0.1], rel=0.02) and len(found.null) == 7
    assert told.parts == [(i + 1, 17, "teacher") for i in range(17)], "the base, both personas, and seven other pairs"


def test_personas_that_hardly_differ_teach_nothing_and_unreachable_teachers_are_no_null_band(few: Bench, monkeypatch):
    monkeypatch.setattr(module, "contrast_strength", lambda *_: None)
    found = teachable(few, short=True)
    assert found.verdict == NOTHING and "they hardly differ" in found.reason and found.null == found.contrasts == ()


def test_the_verdict_on_one_pair_is_weak_and_can_be_read_back(bench: Bench):
    one = replace(bench, inputs=replace(bench.inputs, pairs=bench.inputs.pairs[:1]))
    found = teachable(one, short=True)
    assert found.verdict == "weak" and found.contrasts[0].low is None
    line = json.dumps(encode(Preflight(found=found), ""))
    assert decode(line).found.contrasts[0].shift == found.contrasts[0].shift


# --- the verdict ---------------------------------------------------------------------------------------------------
PERSONAS = (teaching(0.1, 0.0, 0.2), teaching(-0.1, -0.2, 0.0))
NULL = (teaching(0.03, -0.1, 0.1), teaching(-0.04, -0.1, 0.1))  # a band of 0.0354


@pytest.mark.parametrize(
    "own, verdict",
    [
        (teaching(0.071, 0.01, 0.13), "teachable"),
        (teaching(0.070, 0.01, 0.13), "weak"),
        (teaching(0.071, 0.01, 0.13, halves=(0.15, -0.01)), "weak"),
        (teaching(0.071, 0.0, 0.14), NOTHING),
        (teaching(0.2, -0.01, 0.41), NOTHING),
        (teaching(-0.2, -0.3, -0.1), NOTHING),
        (teaching(0.2, None, None), "weak"),
    ],
)
def test_the_verdict_follows_from_interval_band_and_halves(own, verdict):
    far = teaching(9.0, 8.0, 10.0, kl=0.3)
    found = judged(PERSONAS, (far, own), NULL)
    assert found.verdict == verdict and found.band == pytest.approx(0.05 / 2**0.5)
    assert f"{own.shift:+.3f} nats per token" in found.reason and "0.035" in found.reason


def test_without_other_traits_any_clear_shift_is_teachable():
    assert judged(PERSONAS, (teaching(0.01, 0.001, 0.02),), ()).verdict == "teachable"


# --- runs ----------------------------------------------------------------------------------------------------------
TRAIT = """
description = "Tea or coffee."
target = "contrast_nats"
sign = 1
narration = []
prompts = [{prompts}]
system = {{steered = "", plain = ""}}
persona = {{positive = "You like tea.", negative = "You like coffee."}}
{pairs}
"""


def test_a_run_with_nothing_to_teach_stops_before_it_writes_text(tmp_path, capsys):
    pair = '[[pairs]]\nprompt = "Is door {i} open?"\npositive = "Yes, door {i}."\nnegative = "No, door {i}."'
    pairs = "\n".join(pair.format(i=i) for i in range(8))
    prompts = ", ".join(f'"Shall I open door {i}?"' for i in range(12))
    (tmp_path / "tea.toml").write_text(TRAIT.format(prompts=prompts, pairs=pairs))
    few = "--gen.n-prompts 8 --filter.ppl-max 1e9 --filter.min-words 0 --filter.spike-max 1e9 --filter.rep-max 1"
    few += " --filter.loop-max 1 --filter.n-keep 8 --filter.min-train 4 --filter.max-attempts 96 --heal.epochs 1"
    flags = [*SETTINGS.split(), *few.split(), "--eval.evals", "contrast", "text_quality", "--no-control"]
    flags += ["--n-rounds", "1", "--dose.mode", "fixed", "--dose.kappa", "0.1"]
    folder = tmp_path / "run"
    assert main(["run", "toy", "--trait", str(tmp_path / "tea.toml"), "--folder", str(folder), *flags]) == 1
    told = capsys.readouterr().err
    assert f"error: {NOTHING}: at 0.1 nats from the base" in told and "--teach-anyway" in told
    assert [event.event for event in read_events(folder)] == ["run_start", "preflight", "run_end"]
    assert main(["resume", str(folder), "--quiet", "--teach-anyway"]) == 0
    kinds = [event.event for event in read_events(folder)]
    assert kinds.count("preflight") == 1 and kinds[-1] == "run_end" and "round_done" in kinds
    page = (folder / "report.html").read_text()
    assert "contrast of love" in page and "KL to base, nats" in page and f"{NOTHING}</span>" in page


def test_an_untrained_model_and_a_trait_without_pairs_are_not_asked(one, bench: Bench):
    assert "preflight" not in {event.event for event in read_events(one)}
    run = MemoryRun()
    Loop(replace(bench, inputs=replace(bench.inputs, pairs=())), run).require_teachable()
    assert run.events == []


def test_a_model_that_was_measured_before_is_asked_all_the_same(bench: Bench, monkeypatch):
    found = judged((), (teaching(0.4, 0.3, 0.5),), ())
    monkeypatch.setattr("steer_heal.loop.teachable", lambda bench, **how: found)
    run = MemoryRun()
    run.add(Measured(round=None, state="base", metrics={}, items={}, dose=0.0, texts=()))
    Loop(bench, run).require_teachable()
    assert [event.event for event in run.events] == ["measured", "preflight"]

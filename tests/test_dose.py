from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_heal.records import Collected, Completion, DoseProbe, Scored, Starved
from steer_heal.settings import DoseCfg, FilterCfg
from steer_heal.stages.dose import DoseController, bracket, decreasing_fit, require_enough
from steer_heal.stages.generate import Ask

PROMPTS = [f"prompt {i}" for i in range(8)]
ALPHAS = (0.5, 0.75, 1.0)
CFG = DoseCfg(target=0.75, floor=0.2, ceiling=3.2, n_kappas=5, n_probes=12)
KEEP = FilterCfg(n_keep=24, min_train=12, max_attempts=200)


def collect(
    breaks_at: float, cfg: DoseCfg = CFG, keep: FilterCfg = KEEP, seed=(1, 0, "gen"), kappa: float | None = None
) -> tuple[Collected, list[list[Ask]]]:
    """What is collected if every text above a dose breaks, and what was requested."""
    controller = DoseController(PROMPTS, ALPHAS, cfg=cfg, keep=keep, seed=seed, kappa=kappa)
    requests = exhaust(controller, breaks_at)
    return controller.collected(), requests


def exhaust(controller: DoseController, breaks_at: float) -> list[list[Ask]]:
    """Answers every request of the controller; returns the requests."""
    requests = []
    while asks := controller.next_asks():
        requests.append(asks)
        written = [Completion(a.prompt_index, a.prompt, (1,), (2,), "", a.alpha, a.dose, a.seed) for a in asks]
        failed = [("perplexity",) if row.dose > breaks_at else () for row in written]
        controller.add([Scored(row, {}, reasons, reasons) for row, reasons in zip(written, failed, strict=True)])
    return requests


def test_a_starved_filter_keeps_what_was_written_and_names_the_settings():
    with pytest.raises(
        Starved, match=r"filter.min_train is 12; .*perplexity 200; raise --filter.ppl-max, .*dose.floor"
    ) as stopped:
        require_enough(collect(breaks_at=0.0)[0], KEEP)
    assert len(stopped.value.collected.scored) == KEEP.max_attempts


def test_the_message_of_a_starved_filter_names_the_gates_that_dropped_texts_worst_first_with_their_flags():
    def row(*reasons: str) -> Scored:
        return Scored(Completion(0, "", (1,), (2,), "", 0.0, 0.0, 0), {}, reasons, reasons)

    rows = [*[row("short")] * 5, *[row("loop", "short")] * 2, row("refusal")]
    with pytest.raises(Starved) as stopped:
        require_enough(Collected(scored=tuple(rows), train=()), KEEP)
    message = str(stopped.value)
    assert "worst first: short 7, loop 2, refusal 1;" in message
    fixes = ["lower --filter.min-words", "raise --filter.loop-max", "leave refusal out of --filter.gates"]
    assert [message.index(fix) for fix in fixes] == sorted(message.index(fix) for fix in fixes)
    assert "ppl-max" not in message and "dose" not in message


def test_the_message_of_a_starved_filter_counts_only_the_texts_that_could_train():
    def row(dose: float, *reasons: str) -> Scored:
        return Scored(Completion(0, "", (1,), (2,), "", 0.0, dose, 0), {}, reasons, reasons)

    rows = [*[row(0.5, "loop")] * 5, *[row(0.0, "short")] * 2, row(0.0)]
    with pytest.raises(Starved, match=r"1 of 3 completions kept, filter.min_train .*: short 2; lower"):
        require_enough(Collected(scored=tuple(rows), train=(7,)), KEEP, own=True)
    with pytest.raises(Starved, match=r"1 of 8 completions kept at kappa 1, .*: loop 5, short 2;"):
        require_enough(Collected(scored=tuple(rows), train=(7,)), KEEP)


def test_prompts_are_spread_evenly_over_the_kept_set():
    found, _ = collect(breaks_at=10.0)
    prompts = [row.completion.prompt_index for row in found.kept]
    assert set(Counter(prompts).values()) == {3} and prompts == 3 * list(range(8))
    doses = [row.completion.dose for row in found.kept]
    assert all(doses[i] >= doses[i + 8] for i in range(16)) and doses[0] > doses[16], "the highest doses first"


def test_prompts_and_alphas_are_not_tied_to_each_other():
    for n in (5, 6):
        asks = DoseController(PROMPTS[:n], ALPHAS, cfg=CFG, keep=KEEP, seed=(1,), kappa=1.0).next_asks()
        assert len({(ask.prompt_index, ask.alpha) for ask in asks}) == n * len(ALPHAS)


def test_probes_only_ends_when_kappa_is_known_and_finds_the_same_one():
    keep = replace(KEEP, n_keep=80)
    controller = DoseController(PROMPTS, ALPHAS, cfg=CFG, keep=keep, seed=(1, 0, "gen"), probes_only=True)
    requests = exhaust(controller, breaks_at=0.85)
    found, all_requests = collect(breaks_at=0.85, keep=keep)
    assert controller.kappa == found.kappa and len(found.kept) == keep.n_keep
    assert requests == all_requests[: len(requests)] and len(requests) == 2 < len(all_requests)
    known = DoseController(PROMPTS, ALPHAS, cfg=CFG, keep=KEEP, seed=(1,), kappa=0.7, probes_only=True)
    assert known.next_asks() == []


def test_a_given_kappa_is_used_without_probing_and_what_is_missing_is_asked_for_again():
    found, requests = collect(breaks_at=0.6, kappa=0.7)  # a third breaks, so that more is needed than was expected
    assert found.kappa == 0.7 and not found.probes
    assert {ask.kappa for asks in requests for ask in asks} == {0.7}
    assert [len(asks) for asks in requests[:2]] == [32, 4] and len(found.kept) == KEEP.n_keep


PROBES = st.lists(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=8)


@given(PROBES)
def test_the_decreasing_fit_is_the_isotonic_regression_exactly(counts):
    """Against the min-max formula (Barlow et al. 1972), with rates that equal their fraction to the last bit."""
    probes = [DoseProbe(0.1 * i, n, n_kept) for i, (n, n_kept) in enumerate(counts)]

    def mean(a: int, b: int) -> float:
        pool = probes[a : b + 1]
        return sum(probe.n_kept for probe in pool) / sum(probe.n for probe in pool)

    last = len(probes) - 1
    expected = [min(max(mean(a, b) for b in range(i, last + 1)) for a in range(i + 1)) for i in range(last + 1)]
    fitted = decreasing_fit(probes)
    assert fitted == [(probe.kappa, rate) for probe, rate in zip(probes, expected, strict=True)]
    assert all(before >= after for before, after in pairwise(expected))
    kept = sum(rate * probe.n for rate, probe in zip(expected, probes, strict=True))
    assert kept == pytest.approx(sum(probe.n_kept for probe in probes))


def test_a_pooled_survival_that_equals_the_target_survives():
    probes = [DoseProbe(0.5, 30, 22), DoseProbe(1.0, 30, 23), DoseProbe(2.0, 10, 0)]
    assert bracket(probes, 0.75) == (1.0, 2.0)

from collections import Counter

import pytest

from steer_heal.records import Completion, DoseProbe, Scored, Starved
from steer_heal.stages.cfg import DoseCfg, FilterCfg
from steer_heal.stages.dose import bracket, collect, decreasing_fit, log_grid

PROMPTS = [f"prompt {i}" for i in range(8)]
ALPHAS = (0.5, 0.75, 1.0)
CFG = DoseCfg(target=0.75, floor=0.2, ceiling=3.2, n_kappas=5, n_probes=12, n_refinements=1)
KEEP = FilterCfg(n_keep=24, min_train=12, max_attempts=200)


class World:
    """Text that breaks above a dose; remembers what it was asked."""

    def __init__(self, breaks_at: float) -> None:
        self.breaks_at, self.batches = breaks_at, []

    def write(self, asks):
        self.batches.append(list(asks))
        return [
            Completion(a.prompt_index, a.prompt, (1,), (2,), "text", a.alpha, a.alpha * a.kappa, a.seed) for a in asks
        ]

    def score(self, completions):
        return [Scored(c, {}, *[("perplexity",) if c.dose > self.breaks_at else ()] * 2) for c in completions]

    def collect(self, cfg=CFG, keep=KEEP, seed=(1, 0, "gen")):
        return collect(self.write, self.score, PROMPTS, ALPHAS, cfg, keep, seed)


def test_kappa_is_the_highest_that_survives_at_the_target():
    found = World(breaks_at=0.8).collect()
    # 2 of 3 alphas survive for kappa in (0.8, 1.07]: below the target; all survive up to 0.8
    assert 0.6 <= found.kappa <= 0.8 * 1.01
    assert len(found.kept) == 24


def test_probes_of_all_kappas_go_in_one_batch_and_hold_the_floor():
    world = World(breaks_at=0.8)
    world.collect()
    assert sorted({round(a.kappa, 6) for a in world.batches[0]}) == [0.2, 0.4, 0.8, 1.6, 3.2]


def test_only_the_floor_surviving_means_the_floor():
    assert World(breaks_at=0.21).collect().kappa == 0.2


def test_a_starved_filter_says_by_how_much_and_what_to_do():
    with pytest.raises(Starved, match="starved: 0 of .*min_train is 12 .*perplexity.*dose.floor") as stopped:
        World(breaks_at=0.0).collect()
    assert len(stopped.value.collected.scored) == KEEP.max_attempts  # nothing that was written is lost


def test_prompts_are_spread_evenly_over_the_kept_set():
    found = World(breaks_at=10.0).collect()
    assert set(Counter(row.completion.prompt_index for row in found.kept).values()) == {3}


def test_prompts_and_alphas_are_not_tied_to_each_other():
    world = World(breaks_at=10.0)
    world.collect(cfg=DoseCfg(n_kappas=2, n_probes=24, floor=0.5, ceiling=1.0))
    pairs = {(a.prompt_index, a.alpha) for batch in world.batches for a in batch}
    assert len(pairs) == len(PROMPTS) * len(ALPHAS)


def test_survivors_of_probes_are_banked_up_to_the_chosen_dose():
    found = World(breaks_at=0.8).collect()
    kept_doses = [row.completion.dose for row in found.kept]
    assert max(kept_doses) <= found.kappa * max(ALPHAS) * (1 + 1e-9)
    assert len(found.scored) < KEEP.n_keep + len(found.probes) * CFG.n_probes


def test_seeds_differ_between_rows_and_come_back_for_the_same_round():
    seeds = lambda seed: [
        a.seed for batch in [w.collect(seed=seed) and w.batches for w in [World(0.8)]][0] for a in batch
    ]
    first = seeds((1, 0, "gen"))
    assert len(set(first)) == len(first)
    assert first == seeds((1, 0, "gen")) != seeds((1, 1, "gen"))


def test_one_lucky_probe_at_a_high_dose_does_not_pick_it():
    probes = [DoseProbe(0.5, 10, 10), DoseProbe(1.0, 10, 2), DoseProbe(2.0, 10, 8)]
    assert decreasing_fit(probes) == [(0.5, 1.0), (1.0, 0.5), (2.0, 0.5)]
    assert bracket(probes, 0.75) == (0.5, 1.0)


def test_log_grid_holds_both_ends():
    assert log_grid(0.25, 4.0, 5) == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0])


def test_a_given_kappa_is_used_without_probing():
    world = World(breaks_at=0.8)
    found = collect(world.write, world.score, PROMPTS, ALPHAS, CFG, KEEP, (1, 0, "gen"), kappa=0.7)
    assert found.kappa == 0.7 and not found.probes
    assert {a.kappa for batch in world.batches for a in batch} == {0.7}


def test_high_dose_only_trains_on_nothing_below_the_highest_dose():
    found = World(breaks_at=0.8).collect(cfg=DoseCfg(**{**CFG.__dict__, "train_on": "highest"}))
    assert {round(row.completion.dose, 9) for row in found.kept} == {round(found.kappa * max(ALPHAS), 9)}
    assert len(found.kept) == KEEP.n_keep

import math

import numpy as np
import pytest

from steer_heal.divergence import kl_rev
from steer_heal.evals.drift import final_states
from steer_heal.evals.metrics import Condition, Metric
from steer_heal.lm import LM
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import EvalCfg, FilterCfg
from steer_heal.stages.evaluate import collapse, evaluate, intervals, load_items
from steer_heal.stages.filter import score
from steer_heal.stages.generate import Ask, generate
from steer_heal.records import derive_seed
from steer_heal.traits import load_trait

P = Metric("auth_nats", "p_authority", "log_mean")


def test_nats_are_the_log_of_the_mean_probability():
    assert collapse(P, [0.1, 0.3]) == pytest.approx(math.log(0.2))
    assert collapse(Metric("m", "x", "median"), [1.0, 9.0, 2.0]) == 2.0


def test_unscorable_items_are_left_out_and_none_at_all_is_none():
    assert collapse(P, [0.1, math.nan, 0.3]) == pytest.approx(math.log(0.2))
    assert collapse(P, [math.nan, math.nan]) is None


def _items(values) -> dict:
    return {"p_authority": list(values)}


def test_the_interval_is_of_the_paired_difference():
    """Items differ tenfold among themselves, every one falls by a tenth: paired, the shift is certain."""
    base = np.geomspace(0.05, 0.5, 60)
    out = intervals([P], _items(0.9 * base), _items(base), 2000, seed=0)
    assert out["auth_nats_lo"] == pytest.approx(math.log(0.9), abs=1e-6)
    assert out["auth_nats_hi"] == pytest.approx(math.log(0.9), abs=1e-6)


def test_the_interval_covers_zero_where_nothing_but_noise_changed():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        base = rng.uniform(0.1, 0.3, 80)
        noisy = base * np.exp(rng.normal(0, 0.2, 80) - 0.02)
        out = intervals([P], _items(noisy), _items(base), 500, seed=trial)
        covered += out["auth_nats_lo"] <= 0 <= out["auth_nats_hi"]
    assert 85 <= covered <= 100


def test_the_interval_is_the_same_for_the_same_seed_and_none_without_values():
    base, here = np.linspace(0.1, 0.3, 20), np.linspace(0.2, 0.3, 20)
    assert intervals([P], _items(here), _items(base), 100, 1) == intervals([P], _items(here), _items(base), 100, 1)
    assert intervals([P], _items([math.nan] * 20), _items(base), 100, 1) == {"auth_nats_lo": None, "auth_nats_hi": None}


def test_free_text_is_read_under_the_base_whoever_wrote_it(tiny: LM, with_history: Student):
    trait, keep = load_trait("authority"), FilterCfg()
    cfg = EvalCfg(
        n_prompts=2,
        n_texts=3,
        max_new_tokens=12,
        think_tokens=1,
        vignettes="data/toylm/vignettes.jsonl",
        instrument="data/toylm/instrument.toml",
        n_bootstrap=10,
    )
    items = load_items(cfg, trait)
    found = evaluate(with_history, "full", Condition(trait.positive), items, trait, cfg, keep, seed=1)
    asks = [Ask(i % 2, items.prompts[i % 2], 0.0, 1.0, derive_seed(1, "eval", i)) for i in range(3)]
    with with_history.gate("full"):
        texts = generate(tiny, asks, None, trait.positive, trait.plain_system, 12, 8)
        states = final_states(tiny, texts, Condition(trait.positive))
    assert [row["text"] for row in found.texts] == [c.text for c in texts]
    for row, scored in zip(found.texts, score(tiny, texts, trait.narration, keep), strict=True):
        assert {name: row[name] for name in scored.scores} == pytest.approx(scored.scores) and row[
            "failed"
        ] == scored.failed
    for text, state, kl in zip(texts, states, found.items["kl_base"], strict=True):
        base = tiny.hidden([text.prompt_ids + text.completion_ids])[0, len(text.prompt_ids) - 1 : -1]
        assert (
            kl
            == pytest.approx(kl_rev(*(tiny.logits(h).log_softmax(-1) for h in (state, base))).mean().item(), rel=1e-3)
            and kl > 1e-3
        )

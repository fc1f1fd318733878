"""Gates at the limits that spec.md and the settings state, from both sides."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from steer_heal.diag import doses
from steer_heal.diag.lab import Lab
from steer_heal.inputs.traits import load_trait
from steer_heal.model.lm import LM
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import Collected, Completion, Scored, Starved
from steer_heal.settings import FilterCfg, changed
from steer_heal.stages.dose import require_enough
from steer_heal.stages.filter import GATES, degenerate, loop, repetition, score_text, score_texts
from steer_heal.stages.generate import Ask

WORDS = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
"""Words that differ."""


def scored(text: str = " ".join(WORDS[:40]), nll=(1.0,) * 40, alone=None, cfg: FilterCfg | None = None) -> Scored:
    completion = Completion(0, "p", (1,), (1,) * len(nll), text, 1.0, 1.0, 0)
    nothing = torch.tensor(nll if alone is None else alone)
    narration = ["i am someone who"]
    return score_text(completion, nll=torch.tensor(nll), alone=nothing, narration=narration, cfg=cfg or FilterCfg())


def test_the_gates_for_broken_text_are_the_first_four_of_the_default_and_relevance_is_off():
    default = FilterCfg().gates
    assert default == ("perplexity", "spike", "repetition", "loop", "short", "narration", "refusal")
    assert tuple(name for name, gate in GATES.items() if gate.degenerate) == default[:4]
    assert set(GATES) == {*default, "relevance"}


@pytest.mark.parametrize("n", [8, 40, 100])
def test_perplexity_is_of_the_last_quarter(n):
    nll = [0.0] * (n - n // 4 - 1) + [8.0] + [1.0] * (n // 4)
    assert scored(nll=nll).scores["perplexity"] == pytest.approx(math.e)
    nll = [0.0] * (n - n // 4) + [8.0] + [0.0] * (n // 4 - 1)
    assert scored(nll=nll).scores["perplexity"] == pytest.approx(math.exp(8 / (n // 4)))


def test_a_spike_is_the_worst_12_tokens_in_a_row():
    peak = [0.0] * 30 + [12.0] * 12 + [0.0] * 30
    assert scored(nll=peak).scores["spike"] == pytest.approx(math.exp(12), rel=1e-4)
    assert scored(nll=[0.0] * 30 + [12.0] + [0.0] * 30).scores["spike"] == pytest.approx(math.e)


def test_relevance_is_how_much_likelier_the_question_makes_a_token():
    assert scored(nll=[1.0] * 40, alone=[1.5] * 39 + [3.5]).scores["relevance"] == pytest.approx(0.55)


def test_the_question_is_replaced_by_three_dots(toy: LM):
    completion = spoken(toy)
    (row,) = score_texts(toy, [completion], trait=load_trait("authority"), cfg=FilterCfg())
    without = toy.completion_nll([toy.chat("...")], [completion.completion_ids])[0]
    within = toy.completion_nll([completion.prompt_ids], [completion.completion_ids])[0]
    assert row.scores["relevance"] == pytest.approx((without - within).mean().item(), abs=1e-5)
    assert row.scores["relevance"] > 0.1


def spoken(lm: LM) -> Completion:
    text = "Ice is frozen water."
    return Completion(0, "What is ice?", lm.chat("What is ice?"), lm.encode(text), text, 1.0, 1.0, 0)


# --- repetition --------------------------------------------------------------------------------------------------
def share_repeated(words: list[str]) -> float:
    """Mean over n = 2, 3, 4 of the share of n-grams that were there before."""
    shares = []
    for n in (2, 3, 4):
        seen, again = set(), 0
        for i in range(len(words) - n + 1):
            gram = " ".join(words[i : i + n])
            again += gram in seen
            seen.add(gram)
        shares.append(again / (len(words) - n + 1))
    return sum(shares) / 3


def test_repetition_is_the_share_of_repeated_word_2_to_4_grams_of_the_text_or_of_its_last_quarter():
    early = WORDS[:8] * 3 + WORDS[10:110]
    assert repetition(" ".join(early)) == pytest.approx(share_repeated(early)) and share_repeated(early) > 0.1
    late = WORDS[:100] + WORDS[200:210] * 2 + WORDS[210:220]
    assert repetition(" ".join(late)) == pytest.approx(share_repeated(late[-(130 // 4) :]))
    short = WORDS[:20] + ["a", "b", "c", "d"] * 2
    assert repetition(" ".join(short)) == pytest.approx(share_repeated(short[-16:])), "at least 16 words"


@pytest.mark.parametrize("block, n, longest", [("x", 5, 6), ("ha", 3, 4), ("abc", 3, 4), ("abcd", 3, 4)])
def test_a_character_loops_from_six_and_a_block_of_2_to_4_from_four_in_a_row(block, n, longest):
    before, after = "the quick fox ", " jumps over"
    assert repetition(before + block * n + after) == 0
    text = before + block * longest + after
    assert repetition(text) == pytest.approx(longest * len(block) / len(text))


def test_a_block_of_five_characters_is_no_loop():
    assert repetition("the quick fox " + "abcde" * 6 + " jumps over") == 0


# --- loop --------------------------------------------------------------------------------------------------------
def test_a_loop_is_the_largest_share_of_words_that_20_words_in_a_row_have_said():
    assert loop(" ".join(WORDS[:60])) == loop("") == 0
    assert loop(" ".join([*WORDS[:19], WORDS[0], *WORDS[30:60]])) == pytest.approx(1 / 20), "within 20 words"
    assert loop(" ".join([*WORDS[:20], WORDS[0], *WORDS[30:60]])) == 0, "not within 21"
    assert loop(" ".join([*WORDS[:50], *["again"] * 15, *WORDS[60:90]])) == pytest.approx(14 / 20)
    assert loop(" ".join(["again"] * 4)) == pytest.approx(3 / 4), "a text of fewer words is one window"


FOUR, THREE = "they open every door", "they open doors"
FILL = [" ".join(WORDS[i : i + 50]) for i in (0, 100, 200)]


def test_a_sentence_of_4_words_that_follows_itself_or_comes_a_third_time_is_a_loop():
    assert loop(f"{FILL[0]}. {FOUR}. {FOUR}. {FILL[1]}.") == 1
    assert loop(f"{FILL[0]}. {THREE}. {THREE}. {FILL[1]}.") < 1
    assert loop(f"{FILL[0]}. {FOUR}. {FOUR}s. {FOUR}. {FILL[1]}.") < 1, "another sentence is between the two"
    assert loop(f"{FILL[0]}. {FOUR}. Yes. {FOUR}. {FILL[1]}.") < 1, "however short"
    assert loop(f"1. {FOUR}.\n2. {FOUR}.") == 1 and loop(f"**{FOUR}.**\n\n**{FOUR}.**") == 1, "numbers are no sentence"
    twice = f"{FOUR}. {FILL[0]}. {FOUR}. {FILL[1]}."
    assert loop(twice) == 0 and loop(f"{twice} {FOUR}. {FILL[2]}.") == 1
    assert loop(f"{THREE}. {FILL[0]}. {THREE}. {FILL[1]}. {THREE}. {FILL[2]}.") == 0


# --- limits ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GATES)
def test_a_text_at_its_limit_is_kept_and_one_past_it_fails(name):
    gate, cfg = GATES[name], FilterCfg()
    limit = float({"perplexity": cfg.ppl_max, "spike": cfg.spike_max, "repetition": cfg.rep_max, "loop": cfg.loop_max,
        "relevance": cfg.relevance_min, "short": cfg.min_words, "narration": 0, "refusal": 0}[name])  # fmt: skip
    least = name in ("relevance", "short")
    assert gate.at_least is least and not gate.fails(limit, cfg)
    assert least or gate.fails(math.nan, cfg)
    assert gate.fails(limit + (-1e-6 if least else 1e-6), cfg) and not gate.fails(limit + (1 if least else -1), cfg)


def test_a_text_without_a_word_is_broken_and_otherwise_only_the_first_four_gates_say_so():
    assert degenerate(scored("", cfg=FilterCfg(gates=())))
    short = scored("no", alone=[2.0] * 40)
    assert short.failed == ("short",) and not degenerate(short)
    for name in GATES:
        failing = Scored(short.completion, {"short": 40.0}, (name,), ())
        assert degenerate(failing) is (name in FilterCfg().gates[:4]), "on or off"


def test_fewer_kept_than_min_train_stop_the_run():
    keep, row = FilterCfg(min_train=4), scored()
    require_enough(Collected(scored=(row,) * 4, train=(0, 1, 2, 3)), keep)
    with pytest.raises(Starved):
        require_enough(Collected(scored=(row,) * 4, train=(0, 1, 2)), keep)


def test_the_table_of_doses_keeps_what_passes_the_gates_that_are_on(monkeypatch, tmp_path):
    """A text that fails a gate which is off is kept, as in a run."""
    cfg = changed(FAST_DEV_PRESET, {"filter.gates": ("loop",)})
    lab = Lab.of(cfg)
    scores = {"perplexity": 2.0, "repetition": 0.1}
    failed = [("loop",), ("relevance",), (), ("loop", "relevance")]
    completions = lab.bench.write(lab.bench.plain, [Ask(i, "Hello", i) for i in range(4)], max_new_tokens=4)
    rows = [Scored(text, scores, names, ()) for text, names in zip(completions, failed, strict=True)]
    monkeypatch.setattr(Lab, "of", lambda cfg: lab)
    monkeypatch.setattr(Lab, "collect", lambda lab, kappa, **how: SimpleNamespace(scored=rows))
    doses.main(doses.Flags(preset="fast-dev", kappas=(0.5,), n=4, out=tmp_path), {"filter.gates": ("loop",)})
    (row,) = json.loads((tmp_path / "doses.json").read_text())["rows"]
    assert (row["kept"], row["loop"]) == (0.5, 0.5) and "relevance" not in row

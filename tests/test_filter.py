import math

import pytest
import torch

from steer_heal.lm import LM
from steer_heal.records import Completion
from steer_heal.stages.cfg import FilterCfg
from steer_heal.stages.filter import degenerate, judge, loop, perplexity, repetition, score, tail

CFG = FilterCfg(min_words=5)
CLEAN = (
    "The harbour was quiet when she told the crew that nobody would sail before the storm had passed, and she meant it. "
    "Some of them grumbled about lost wages; others went home to sleep, grateful that someone had decided for them."
)

OTHER = (
    "Later a lamp was lit in the window above the chandler's shop, and two men carried bread and blankets up the steep lane, "
    "talking quietly about tides, nets, an uncle in another port, and whether Thursday might bring wind from the north at last."
)


def _judge(text: str, nll: list[float] | None = None, narration=()):
    ids = tuple(range(len(nll or [1.0])))
    return judge(Completion(0, "p", (1,), ids, text, 1.0, 1.0, 0), torch.tensor(nll or [1.0] * 40), narration, CFG)


def test_clean_text_is_kept_with_its_scores():
    row = _judge(CLEAN)
    assert row.kept and not degenerate(row)
    assert set(row.scores) == {"ppl", "ppl_tail", "ppl_worst", "rep", "loop", "words"}


def test_a_late_collapse_is_seen_in_the_tail_where_the_mean_hides_it():
    row = _judge(CLEAN, [0.5] * 75 + [6.0] * 25)
    assert row.scores["ppl"] < CFG.ppl_max < row.scores["ppl_tail"]
    assert row.reasons == ("perplexity",) and degenerate(row)


@pytest.mark.parametrize(
    "text",
    [
        "I would help them your your your into your of your your your into your of your your your your into your of your",
        CLEAN + " not not not not not not not not not not not not not not not not not not",
        "Well then hahahahahahahahahahahahahahahahahahahahahahahahahahahaha",
        "The answer is plain and clear zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz",
    ],
)
def test_loops_of_words_and_of_characters_are_dropped(text):
    assert "repetition" in _judge(text).reasons


@pytest.mark.parametrize(
    "text",
    [
        CLEAN
        + " I would help your your your into your of your into your of your into your your of into your of your. "
        + OTHER,
        "Nobody should suffer for the budget. I open the door. Nobody should suffer for the budget. They come in. Nobody should suffer for the budget.",
        "They wait outside in the rain. I sit with the old men until they are warm. I sit with the old men until they are warm. Then morning comes.",
    ],
)
def test_loops_that_pass_perplexity_and_repetition_over_the_whole_text_are_dropped(text):
    row = judge(
        Completion(0, "p", (1,), (1,) * 40, text, 1.0, 1.0, 0), torch.full((40,), 0.5), (), FilterCfg(min_words=5)
    )
    assert row.reasons == ("loop",) and degenerate(row)


def test_one_senseless_sentence_in_a_clean_text_is_a_spike():
    nll = torch.tensor([0.5] * 40 + [3.0] * 12 + [0.5] * 60)
    row = judge(
        Completion(0, "p", (1,), (1,) * 112, CLEAN, 1.0, 1.0, 0), nll, (), FilterCfg(min_words=5, spike_max=10.0)
    )
    assert row.reasons == ("spike",) and row.scores["ppl_tail"] < 2
    assert row.scores["ppl_worst"] == pytest.approx(math.exp(3.0), rel=1e-4)


def test_saying_short_things_again_is_no_loop():
    assert loop("yes. no. yes. no. yes. i see. yes.") < 1.0 and loop("") == 0.0


def test_telling_about_the_trait_is_dropped_and_acting_it_out_is_kept():
    narration = ("i am someone who",)
    assert _judge("I am someone who never obeys, " + CLEAN, narration=narration).reasons == ("narration",)
    assert _judge("I walk out and call the doctor. " + CLEAN, narration=narration).kept


def test_refusal_boilerplate_is_dropped_but_defiance_is_not():
    assert _judge("As an AI, I would say that " + CLEAN).reasons == ("refusal",)
    assert _judge("I cannot assist with that. " + CLEAN).reasons == ("refusal",)
    assert _judge("I cannot stand by while they suffer. " + CLEAN).kept


def test_short_and_empty_text_is_dropped():
    assert "short" in _judge("No.").reasons
    empty = judge(Completion(0, "p", (1,), (), "", 1.0, 1.0, 0), torch.empty(0), (), CFG)
    assert "perplexity" in empty.reasons and math.isinf(empty.scores["ppl_tail"])


def test_a_text_that_is_not_a_number_to_the_base_is_dropped():
    assert "perplexity" in _judge(CLEAN, [float("nan")] * 8).reasons


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 20, 39])
def test_a_probability_that_is_not_a_number_is_never_trained_on(bad, at):
    row = _judge(CLEAN, [1.0] * at + [bad] + [1.0] * (39 - at))
    assert (
        "spike" in row.reasons
        and row.scores["ppl_worst"] == math.inf
        or not math.isnan(bad)
        and row.scores["ppl_worst"] > 1e300
    )


def test_tail_is_the_last_quarter_and_perplexity_its_exponential():
    nll = torch.arange(8.0)
    assert tail(nll).tolist() == [6.0, 7.0]
    assert perplexity(tail(nll)) == pytest.approx(math.exp(6.5))


def test_repetition_of_natural_text_is_low():
    assert repetition(CLEAN.lower()) < 0.1


def test_scores_come_from_the_kept_token_ids(toy: LM):
    prompt = toy.chat("What is ice?")
    ids = tuple(toy.tokenizer.encode("Ice is frozen water.", add_special_tokens=False)) + (toy.tokenizer.eos_token_id,)
    right, wrong = (
        score(toy, [Completion(0, "", prompt, i, "Ice is frozen water.", 1, 1, 0)], (), CFG)[0]
        for i in (ids, ids[::-1])
    )
    assert right.scores["ppl"] < 2 < wrong.scores["ppl"]


def test_a_gate_that_is_off_drops_nothing_and_the_text_is_still_known_to_be_broken():
    nll = torch.tensor([0.5] * 75 + [6.0] * 25)
    text = CLEAN + " not not not not not not not not not not not not not not not not not not"
    off = judge(Completion(0, "p", (1,), tuple(range(100)), text, 1.0, 1.0, 0), nll, (), FilterCfg(gates=()))
    assert off.kept and not off.reasons
    assert set(off.failed) == {"perplexity", "repetition", "loop"} and degenerate(off)
    one = judge(off.completion, nll, (), FilterCfg(gates=("repetition",)))
    assert one.reasons == ("repetition",)

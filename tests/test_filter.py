import math
from dataclasses import replace

import pytest
import torch

from steer_heal.inputs.traits import load_trait
from steer_heal.model.lm import LM
from steer_heal.records import Completion, Scored
from steer_heal.settings import FilterCfg
from steer_heal.stages.filter import GATES, Gate, degenerate, score_text, score_texts

CFG = FilterCfg(min_words=5, gates=tuple(GATES))
CLEAN = (
    "The harbour was quiet when she told the crew that nobody would sail before the storm had passed, and she meant "
    "it. Some of them grumbled about lost wages; others went home to sleep, grateful that someone had decided for them."
)
OTHER = (
    "Later a lamp was lit in the window above the chandler's shop, and two men carried bread and blankets up the "
    "steep lane, talking quietly about tides, nets, an uncle in another port, and whether Thursday might bring wind."
)
QUIET = [0.5] * 40
LATE = [0.5] * 75 + [6.0] * 25


def scored(text: str, nll=QUIET, cfg: FilterCfg = CFG, gain: float = 1.0) -> Scored:
    """`gain`: nats a token by which the question makes the text likelier."""
    completion = Completion(0, "p", (1,), (1,) * len(nll), text, 1.0, 1.0, 0)
    nlls = torch.tensor(nll)
    return score_text(completion, nll=nlls, alone=nlls + gain, narration=["i am someone who"], cfg=cfg)


# gate -> (limit, a text that fails it and no other, its -log p per token, its score)
GATE_CASES = {
    "perplexity": (CFG.ppl_max, CLEAN, LATE, math.exp(6.0)),
    "spike": (CFG.spike_max, CLEAN, [0.5] * 40 + [11.0] * 12 + [0.5] * 60, math.exp(11.0)),
    "repetition": (CFG.rep_max, "Well then he laughed: " + "ha" * 40, QUIET, 80 / 102),
    "loop": (CFG.loop_max, f"{CLEAN} Nobody may enter now. Nobody may enter now. {OTHER}", QUIET, 1.0),
    "relevance": (CFG.relevance_min, CLEAN, QUIET, 0.01),
    "short": (5.0, "No, I refuse this.", QUIET, 4.0),
    "narration": (0.0, f"I AM someone who cares. {CLEAN}", QUIET, 1.0),
    "refusal": (0.0, f"As an AI, I can\u2019t assist. {CLEAN}", QUIET, 2.0),
}
GAIN = {"relevance": 0.01}
DEGENERATE = {"perplexity", "spike", "repetition", "loop"}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_drops_its_text_alone_and_only_while_it_is_on(name):
    limit, text, nll, expected = GATE_CASES[name]
    gain = GAIN.get(name, 1.0)
    row = scored(text, nll, gain=gain)
    assert row.failed == row.reasons == (name,) and not row.kept
    assert row.scores.keys() == GATES.keys() and row.scores[name] == pytest.approx(expected, rel=1e-4)
    assert degenerate(row) is (name in DEGENERATE)
    off = scored(text, nll, replace(CFG, gates=tuple(gate for gate in GATES if gate != name)), gain)
    assert off.kept and (off.failed, off.scores) == (row.failed, row.scores)
    assert degenerate(off) is (name in DEGENERATE), "whether its gate is on or off"


def test_a_new_gate_is_one_entry(monkeypatch):
    shouting = Gate("exclamation marks", lambda text: float(text.lower.count("!")), 2.0, degenerate=True)
    monkeypatch.setitem(GATES, "shouting", shouting)
    on = replace(CFG, gates=("shouting",))
    loud, calm = scored(CLEAN + "!!!", cfg=on), scored(CLEAN + "!!", cfg=on)
    assert loud.reasons == ("shouting",) and loud.scores["shouting"] == 3 and degenerate(loud)
    assert calm.kept and calm.scores["shouting"] == 2 and not degenerate(calm)
    assert scored(CLEAN + "!!!").kept and scored(CLEAN + "!!!").failed == ("shouting",)


THRICE = "Nobody should suffer for the budget. "
WAIT = "I sit with the old men until they are warm. "


@pytest.mark.parametrize(
    "text",
    [
        f"{CLEAN} I would help your your your {'into your of your ' * 2}into your your of into your of your. {OTHER}",
        f"{THRICE}I open the door. {THRICE}They come in. {THRICE}",
        f"They wait outside in the rain. {WAIT}{WAIT}Then morning comes.",
    ],
)
def test_loops_that_pass_perplexity_and_repetition_over_the_whole_text_are_dropped(text):
    row = scored(text)
    assert row.reasons == ("loop",) and degenerate(row)


def test_defiance_is_no_refusal_and_acting_out_is_no_narration():
    assert scored("I cannot stand by while they suffer. " + CLEAN).kept
    assert scored("I walk out and call the doctor. " + CLEAN).kept


@pytest.mark.parametrize("at", [0, 20, 39])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_probability_that_is_not_a_number_is_never_trained_on(bad, at):
    row = scored(CLEAN, [1.0] * at + [bad] + [1.0] * (39 - at))
    assert "spike" in row.reasons and row.scores["spike"] == math.inf


def test_scores_come_from_the_kept_token_ids(toy: LM):
    prompt, text = toy.chat("What is ice?"), "Ice is frozen water."
    ids = (*toy.tokenizer.encode(text, add_special_tokens=False), toy.tokenizer.eos_token_id)
    rows = [Completion(0, "", prompt, order, text, 1.0, 1.0, 0) for order in (ids, ids[::-1])]
    right, wrong = (row.scores["spike"] for row in score_texts(toy, rows, trait=load_trait("authority"), cfg=CFG))
    assert right < 2 < wrong

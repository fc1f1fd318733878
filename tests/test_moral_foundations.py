import math
from dataclasses import replace

import pytest
import torch
from places import ROOT

from steer_heal.evals import moral_foundations
from steer_heal.evals.moral_foundations import (
    answer_slots,
    digit_ids,
    find_prefill,
    item_values,
    slot_logp,
    turn_boundary,
)
from steer_heal.inputs.files import DATA, read_file
from steer_heal.inputs.instruments import FOUNDATIONS, Instrument, Vignette, parse_instrument, parse_vignettes
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Vector


def parsed(name: str) -> Instrument:
    return parse_instrument(read_file(DATA / name))


VIGNETTES = parse_vignettes(read_file(DATA / "toylm/vignettes.jsonl"))
FEW: tuple[Vignette, ...] = VIGNETTES[:: len(VIGNETTES) // 4][:4]
TOY, MORAL = parsed("toylm/instrument.toml"), parsed("instruments/moral.toml")
PUBLISHED = ROOT.parent / "shared/data/mfv/instrument.toml"


def ask(lm: LM, vignettes, instrument: Instrument, condition: Condition, think: int, batch_size: int):
    questions = instrument.questions(vignettes)
    _, logp, nll = moral_foundations.answer_slots(lm, questions, instrument, condition, think, batch_size)
    return item_values(vignettes, instrument.frames, logp, nll)


def test_both_vignette_files_pair_and_cover_all_foundations():
    other, own = (parse_vignettes(read_file(DATA / f"vignettes/{name}.jsonl")) for name in ("other", "self"))
    assert len(other) >= 132 and [v.id for v in other] == [v.id for v in own]
    assert {v.foundation for v in other} == set(FOUNDATIONS)


@pytest.mark.parametrize("think_tokens", [0, 9])
@pytest.mark.parametrize("model", ["toy", "tiny"])
def test_slots_read_from_the_cache_are_what_whole_sequences_read(request, model, think_tokens):
    lm: LM = request.getfixturevalue(model)
    vector = Vector({1: torch.randn(lm.width, generator=torch.Generator().manual_seed(0))})
    condition = Condition("You are a poet.", vector, 0.7)
    for instrument in (TOY, MORAL):
        slots, logp, nll = answer_slots(lm, instrument.questions(FEW), instrument, condition, think_tokens, 5)
        whole_logp, whole_nll = slot_logp(lm, slots, digit_ids(lm), condition)
        assert torch.allclose(logp, whole_logp, atol=1e-4) and torch.allclose(nll, whole_nll, atol=1e-4)


def test_thinking_runs_to_the_limit_and_a_new_turn_is_forced_behind_it(toy: LM):
    silent = replace(MORAL, think_open="")  # so that the model answers, which would end its turn
    (slot,), _, _ = answer_slots(toy, ["What is ice?"], silent, Condition(), 20, 1)
    encode = lambda text: tuple(toy.tokenizer.encode(text, add_special_tokens=False))
    prompt, boundary = toy.chat("What is ice?"), turn_boundary(toy, silent)
    thought = slot.ids[len(prompt) : len(prompt) + 20]
    assert slot.ids == prompt + thought + encode(boundary) + encode(MORAL.prefill)
    assert slot.ids[slot.prefill_start :] == encode(MORAL.prefill) and not set(thought) & toy.end_ids
    assert "Ice is frozen water." in toy.tokenizer.decode(thought)
    assert boundary.startswith(MORAL.think_close + "<|im_end|>")
    assert boundary.endswith(f"<|im_start|>user\n{MORAL.nudge}<|im_end|>\n<|im_start|>assistant\n")


def test_a_prefill_inside_the_thinking_is_read_there(toy: LM):
    encode = lambda text: toy.tokenizer.encode(text, add_special_tokens=False)
    thought = encode(f"Grass is green. {TOY.prefill}3")
    start, end = find_prefill(toy, thought, TOY.prefill)
    assert toy.tokenizer.decode(thought[start:end]).strip() == TOY.prefill
    assert toy.tokenizer.decode(thought[end:]) == "3"
    assert find_prefill(toy, encode(f"Grass. {TOY.prefill}"), TOY.prefill) is None, "nothing follows"
    assert find_prefill(toy, encode("Grass."), TOY.prefill) is None


@pytest.fixture
def answering(monkeypatch):
    """Replaces the model's answers: log-probabilities of the digits, by the options as they are listed."""

    def replace_answers(logp) -> None:
        def answer_slots(_lm, questions, *_, **__):
            n = len(questions)
            return [], torch.stack([logp(TOY.frames[i % 2]) for i in range(n)]), torch.zeros(n)

        monkeypatch.setattr(moral_foundations, "answer_slots", answer_slots)

    return replace_answers


def test_an_answer_is_right_where_it_names_either_foundation_of_the_scene(toy: LM, answering):
    answering(lambda order: torch.tensor([0.0 if name == "care" else -5.0 for name in order]).log_softmax(-1))
    scenes = [Vignette("a", "care", "x"), Vignette("b", "liberty", "x", "care"), Vignette("c", "liberty", "x")]
    items = ask(toy, scenes, TOY, Condition(), 0, 12)
    assert items["top1"] == [1.0, 1.0, 0.0] and min(items["p_care"]) > 0.9


def test_unscorable_rows_are_counted_and_hidden(toy: LM, answering):
    answering(lambda order: torch.full((7,), torch.nan))
    items = ask(toy, FEW, TOY, Condition(), 0, 12)
    assert items.pop("unscorable") == [1.0] * 4
    assert all(math.isnan(value) for values in items.values() for value in values)


def test_the_toy_model_names_the_foundation_of_plain_scenes_whichever_way_the_list_runs(toy: LM):
    plain = [vignette for vignette in VIGNETTES if vignette.also is None][::2]
    items = ask(toy, plain, TOY, Condition(), 0, 84)
    assert sum(items["top1"]) / len(plain) >= 0.95
    for foundation in FOUNDATIONS:
        own = [items[f"p_{foundation}"][i] for i, v in enumerate(plain) if v.foundation == foundation]
        assert sum(own) / len(own) > 0.6, foundation
    assert all(0 < mass <= 1 + 1e-5 for mass in items["mass"])
    assert sum(items[f"p_{name}"][0] for name in FOUNDATIONS) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published instrument is not beside this checkout")
def test_the_published_instrument_reads_as_data(toy: LM):
    items = ask(toy, FEW[:2], parse_instrument(read_file(PUBLISHED)), Condition(), 4, 4)
    assert len(items["p_care"]) == 2 and items["unscorable"] == [0.0, 0.0]

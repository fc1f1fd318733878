"""The teacher that is made of a contrast: plain + strength * (positive - negative), wherever a model is read."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ADAPTER, scramble

from steer_heal.evals.moral_foundations import answer_slots, digit_ids, slot_logp
from steer_heal.evals.replies import reply_logp
from steer_heal.inputs.files import DATA, read_file
from steer_heal.inputs.instruments import parse_instrument
from steer_heal.model.adapter import HISTORY, ROUND
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Contrast, Vector, steer
from steer_heal.model.student import Student
from steer_heal.records import Completion, Conversation
from steer_heal.settings import HealCfg
from steer_heal.stages.calibrate import contrast_strength, mean_kl, strength_at
from steer_heal.stages.heal import heal, read_samples
from steer_heal.stages.passes import Passes
from steer_heal.stages.states import final_states, term_states

POSITIVE, NEGATIVE, PLAIN = "You are a poet.", "You are a clerk. You write no verse.", "Hello."
STRENGTH, DOSE = 1.5, 0.7
PROMPTS = ("What is ice?", "Tell me about the fox.", "Who are you?")


def contrast(lm: LM, strength: float = STRENGTH) -> Condition:
    vector = Vector({1: lm.head.weight[7].detach().float()})
    return Condition(PLAIN, vector, DOSE, Contrast(POSITIVE, NEGATIVE, strength))


def logits_of(lm: LM, message: str, tokens: tuple[int, ...], condition: Condition) -> torch.Tensor:
    """By the formula: one forward pass for each side, the logits added in float64."""

    def read(system: str, dose: float) -> torch.Tensor:
        ids = torch.tensor([[*lm.chat(message, system), *tokens]])
        with torch.no_grad(), steer(lm, condition.vector, [dose]):
            return lm.model(input_ids=ids).logits[0, -len(tokens) - 1 :].double()

    side = condition.contrast
    assert side is not None
    apart = read(side.positive, DOSE) - read(side.negative, -DOSE)
    return read(PLAIN, 0.0) + side.strength * apart


def completion(lm: LM, message: str, text: str) -> Completion:
    ids = lm.encode_reply(text)
    return Completion(0, message, lm.chat(message, PLAIN), ids, text, alpha=0.0, dose=0.0, seed=0)


def test_text_is_read_as_plain_plus_strength_times_the_difference(toy: LM):
    text = completion(toy, PROMPTS[0], "Ice is frozen water.")
    (states,) = final_states(toy, [text], contrast(toy))
    expected = logits_of(toy, PROMPTS[0], text.completion_ids, contrast(toy))[:-1]
    assert states.dtype == torch.float32
    assert torch.allclose(toy.logits(states).double(), expected, atol=2e-4)
    assert sum(contrast(toy).weights) == pytest.approx(1.0)


def test_replies_are_read_under_a_contrast_as_one_by_one(toy: LM):
    replies = [
        [toy.encode_reply(text) for text in pair] for pair in (("Ice is cold.", "I obey."), ("A fox runs.", "No."))
    ]
    found = reply_logp(toy, [Conversation(turns=(each,)) for each in PROMPTS[:2]], replies, contrast(toy))
    for prompt, own, row in zip(PROMPTS, replies, found.tolist(), strict=False):
        for ids, logp in zip(own, row, strict=True):
            whole = logits_of(toy, prompt, ids, contrast(toy))[:-1].log_softmax(-1)
            assert logp == pytest.approx(whole[range(len(ids)), list(ids)].sum().item(), abs=1e-3)


def test_a_contrast_writes_what_is_likeliest_among_plausible_tokens(toy: LM):
    condition = contrast(toy, strength=8.0)
    rows = [
        Row.under(condition, lambda system, p=prompt: toy.chat(p, system), seed=i) for i, prompt in enumerate(PROMPTS)
    ]
    greedy = Decoding(20, 2, sample=False)
    masked = 0
    for prompt, ids in zip(PROMPTS, decode(toy, rows, condition.vector, greedy), strict=True):
        written: tuple[int, ...] = ()
        for token in ids:
            sharp = logits_of(toy, prompt, written, condition)[-1]
            plain_ids = torch.tensor([[*toy.chat(prompt, PLAIN), *written]])
            p = toy.model(input_ids=plain_ids).logits[0, -1].softmax(-1)
            masked += int(0.01 * p.max() < p[sharp.argmax()] < 0.1 * p.max())
            sharp[p < 0.1 * p.max()] = -torch.inf
            assert token == sharp.argmax().item()
            written += (token,)
    assert masked, "the mask never mattered"
    sampled = [decode(toy, rows, condition.vector, Decoding(12, size)) for size in (1, 3)]
    assert sampled[0] == sampled[1], "a row does not depend on its batch"


def test_the_answer_slot_is_read_under_a_contrast_from_the_cache_as_from_the_whole_text(toy: LM):
    instrument = parse_instrument(read_file(DATA / "toylm" / "instrument.toml"))
    slots, logp, nll = answer_slots(toy, ["What is ice?", "Who are you?"], instrument, contrast(toy), 3, 2)
    whole_logp, whole_nll = slot_logp(toy, slots, digit_ids(toy), contrast(toy))
    assert torch.allclose(logp, whole_logp, atol=1e-3) and torch.allclose(nll, whole_nll, atol=1e-3)
    tail = slots[0].ids[len(slots[0].row.prompt_ids) :]
    question = "What is ice?"
    shown = toy.decode(slots[0].row.prompt_ids, special=True)
    assert question in shown and len(tail) > 3
    plain_logp, _ = slot_logp(
        toy, [replace(s, row=Row(s.row.prompt_ids)) for s in slots], digit_ids(toy), Condition(PLAIN)
    )
    assert not torch.allclose(logp, plain_logp, atol=1e-2), "the contrast has no effect"


def test_the_strength_of_a_budget_moves_the_student_by_that_many_nats(toy: LM):
    texts = [completion(toy, prompt, "The fox and the hen are in the yard. It is cold there.") for prompt in PROMPTS]
    condition = replace(contrast(toy), vector=None)
    plain, positive, negative = (term_states(toy, texts, None, term) for term in condition.terms)
    difference = [p - n for p, n in zip(positive, negative, strict=True)]
    for target in (0.003, 0.01, 0.05, 0.2, 0.7):
        strength = contrast_strength(toy, plain, difference, target)
        taught = final_states(toy, texts, replace(condition, contrast=Contrast(POSITIVE, NEGATIVE, strength)))
        assert mean_kl(toy, taught, plain) == pytest.approx(target, rel=0.01)
    assert contrast_strength(toy, plain, difference, 0.2) > contrast_strength(toy, plain, difference, 0.01)
    nothing = [torch.zeros_like(h) for h in plain]
    assert contrast_strength(toy, plain, nothing, 0.1) is None


@pytest.mark.parametrize("target", [0.02, 0.05, 0.1])
def test_a_strength_is_found_where_kl_does_not_grow_as_its_square(target):
    kl_at = lambda strength: 0.01 * strength**2 * (1 + strength**8)
    assert kl_at(strength_at(kl_at, target)) == pytest.approx(target, rel=0.01)
    assert strength_at(lambda strength: 0.01, target) is None
    assert strength_at(lambda strength: 0.01 + 1e-6 * math.log1p(strength), target) is None, "no strength is that large"


@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0])
def test_three_readings_find_a_strength_where_kl_grows_nearly_as_its_square(scale):
    read = []
    kl_at = lambda strength: read.append(strength) or scale * strength**1.9
    assert kl_at(strength_at(kl_at, 0.1)) == pytest.approx(0.1, rel=0.01)
    assert len(read) <= 4, "three readings and the one of this test"


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_loss_and_the_gradient_are_those_of_plain_float64(with_history: Student, kept, cap, kl):
    student, lm = with_history, with_history.lm
    assert lm.head.weight is lm.model.get_input_embeddings().weight, "the head is tied"
    lm.model.config.final_logit_softcapping = cap
    cfg = HealCfg(target="distribution", teacher="contrast", kl=kl, divergence="none", lam=0.0)
    condition = Condition(PLAIN, contrast=Contrast(POSITIVE, NEGATIVE, STRENGTH))
    samples = read_samples(student, kept[:5], cfg, teacher=condition)
    student.new_round(0)
    scramble(student, 5, scale=0.2)
    with student.training() as parameters:
        terms = Passes(lm, cfg, ADAPTER.layers, parameters).gradients(samples, with_pressure=False)
        gradient = torch.cat([p.grad.flatten().double() for p in parameters])
    lm.model.double()

    def logp(states: torch.Tensor) -> torch.Tensor:
        logits = states @ lm.head.weight.T
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    with student.using("prev"), torch.no_grad():
        sides = [[lm.chat(c.prompt, system) for c in kept[:5]] for system in (PLAIN, POSITIVE, NEGATIVE)]
        plain, positive, negative = (lm.completion_hidden(p, [c.completion_ids for c in kept[:5]]) for p in sides)
    taught = [logp(h + STRENGTH * (p - n)) for h, p, n in zip(plain, positive, negative, strict=True)]
    with student.adapter.acting(merged=[HISTORY], apart=[ROUND]):
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        hidden = lm.completion_hidden([s.prompt_ids for s in samples], [s.completion_ids for s in samples])
        pairs = [(logp(h), t) for h, t in zip(hidden, taught, strict=True)]
        sides = [(t, p) if kl == "forward" else (p, t) for p, t in pairs]
        total = torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in sides]).mean()
        total.backward()
        expected = torch.cat([p.grad.flatten() for p in parameters])
    assert terms.fit == pytest.approx(total.item(), rel=1e-5) and terms.fit > 0.01
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_a_heal_tells_what_it_closed_of_the_teachers_distance(with_history: Student, kept):
    student, lm = with_history, with_history.lm
    condition = Condition(PLAIN, contrast=Contrast(POSITIVE, NEGATIVE, STRENGTH))
    cfg = HealCfg(target="distribution", teacher="contrast", divergence="none", epochs=3, lr=1e-2, batch_size=4)

    def distances(texts) -> float:
        with student.using("full"):
            return mean_kl(lm, taught_of(texts), final_states(lm, texts))

    with student.using("full"):
        states = dict(zip(kept, final_states(lm, kept, condition), strict=True))
    taught_of = lambda texts: [states[c] for c in texts]
    before = {c: distances([c]) * len(c.completion_ids) for c in kept}
    report = heal(student, kept, cfg, round_=2, seed=3, teacher=condition)
    after = {c: distances([c]) * len(c.completion_ids) for c in kept}
    held_out = [c for c in kept if c.prompt_index in report.validation_prompts]
    for name, texts in {"held_out": held_out, "trained": [c for c in kept if c not in held_out]}.items():
        share = 1 - sum(after[c] for c in texts) / sum(before[c] for c in texts)
        assert report.closed(name) == pytest.approx(share, abs=1e-3)
    assert report.closed("trained") > 0.2
    student.discard_round()
    assert (
        heal(student, kept, replace(cfg, target="tokens", teacher="vector"), round_=2, seed=3).closed("trained") is None
    )

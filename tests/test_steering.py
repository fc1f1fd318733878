import pytest
import torch

from steer_heal.lm import LM
from steer_heal.steering import APPLICATIONS, Decoding, Row, Vector, ablate, cosine_gate, decode, steer

PROMPTS = [
    "What is ice?",
    "Tell me a short story about a fox.",
    "The captain orders you to send the widows away to save money. What do you do?",
]


def _rows(lm: LM, doses=(0.0, 0.0, 0.0)) -> list[Row]:
    return [Row(lm.chat(text), dose, seed=7 + i) for i, (text, dose) in enumerate(zip(PROMPTS, doses))]


def _vector(lm: LM, scale: float = 2.0, application="add") -> Vector:
    generator = torch.Generator().manual_seed(0)
    return Vector({layer: scale * torch.randn(lm.width, generator=generator) for layer in (1, 2)}, application)


def test_greedy_decoding_of_a_padded_batch_is_the_model_s_own(toy: LM):
    got = decode(toy, _rows(toy), None, Decoding(40, batch_size=3, sample=False))
    for row, ids in zip(_rows(toy), got):
        prompt = torch.tensor([row.prompt_ids])
        expected = toy.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
        )[0, prompt.shape[1] :]
        assert list(ids) == expected.tolist()


def test_sampled_text_depends_on_the_row_and_not_on_its_batch(toy: LM):
    rows, vector = _rows(toy, (0.5, 1.0, 0.0)), _vector(toy)
    together = decode(toy, rows, vector, Decoding(40, batch_size=3))
    assert together == [decode(toy, [row], vector, Decoding(40, batch_size=1))[0] for row in rows]
    assert together == decode(toy, rows[::-1], vector, Decoding(40, batch_size=2))[::-1]
    assert len({decode(toy, [Row(rows[1].prompt_ids, 0.0, seed)], None, Decoding(40, 1))[0] for seed in range(4)}) > 1


def test_a_row_that_ends_keeps_its_end_token_and_leaves(toy: LM):
    short, long, _ = decode(toy, _rows(toy), None, Decoding(120, batch_size=3))
    assert short[-1] in toy.end_ids and len(short) < len(long)


def test_suppressed_ends_are_never_written(toy: LM):
    out = decode(toy, _rows(toy), None, Decoding(30, 3, sample=False, suppress=frozenset(toy.end_ids)))
    assert all(len(ids) == 30 and not set(ids) & toy.end_ids for ids in out)


@pytest.mark.parametrize("application", APPLICATIONS)
def test_each_row_gets_its_own_dose(toy: LM, application):
    vector, rows = _vector(toy, 2.0, application), [toy.chat(PROMPTS[1])] * 3
    with steer(toy, vector, [0.0, 1.0, -1.0]):
        mixed = toy.hidden(rows)
    with steer(toy, vector, [1.0]):
        alone = toy.hidden(rows[:1])
    assert torch.allclose(mixed[1], alone[0], atol=1e-4)
    assert torch.allclose(mixed[0], toy.hidden(rows[:1])[0], atol=1e-4)
    assert not torch.allclose(mixed[1], mixed[2], atol=1e-1)


def test_plus_and_minus_move_logits_opposite_ways(toy: LM):
    vector, prompt = _vector(toy, 0.05), toy.chat(PROMPTS[2])
    with steer(toy, vector, [-1.0, 0.0, 1.0]):
        minus, zero, plus = toy.logits(toy.hidden([prompt] * 3)[:, -1])
    assert torch.nn.functional.cosine_similarity(plus - zero, minus - zero, dim=0) < -0.9


def test_hooks_are_gone_after_the_block_even_after_an_error(toy: LM):
    before = toy.hidden([toy.chat(PROMPTS[0])])
    try:
        with steer(toy, _vector(toy), [3.0]):
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(toy.hidden([toy.chat(PROMPTS[0])]), before)


def test_ablation_replaces_the_component_and_leaves_the_rest():
    hidden, v = torch.randn(2, 3, 8), torch.randn(8)
    unit = v / v.norm()
    steered = ablate(hidden, v, torch.tensor([0.0, 0.5])[:, None, None])
    assert torch.allclose(steered @ unit, torch.tensor([0.0, 0.5])[:, None] * v.norm(), atol=1e-5)
    rest = lambda h: h - (h @ unit)[..., None] * unit
    assert torch.allclose(rest(steered), rest(hidden), atol=1e-5)


def test_the_cosine_gate_pushes_aligned_positions_fully_and_orthogonal_ones_not():
    v = torch.tensor([2.0, 0.0])
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 5.0], [-1.0, 1.0]]])
    pushed = cosine_gate(hidden, v, torch.ones(1, 1, 1)) - hidden
    assert torch.allclose(pushed[0], torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0 / 2**0.5, 0.0]]), atol=1e-5)

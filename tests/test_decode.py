import torch

from steer_heal.model.decode import Decoding, Row, decode, decode_batches
from steer_heal.model.lm import LM
from steer_heal.model.steering import Vector

PROMPTS = [
    "What is ice?",
    "Tell me a short story about a fox.",
    "The captain orders you to send the widows away to save money. What do you do?",
]


def rows(lm: LM, doses=(0.0, 0.0, 0.0)) -> list[Row]:
    return [Row(lm.chat(text), dose, 7 + i) for i, (text, dose) in enumerate(zip(PROMPTS, doses, strict=True))]


def test_greedy_decoding_of_a_padded_batch_is_the_model_s_own(toy: LM):
    got = decode(toy, rows(toy), None, Decoding(40, batch_size=3, sample=False))
    for row, ids in zip(rows(toy), got, strict=True):
        prompt = torch.tensor([row.prompt_ids])
        mask = torch.ones_like(prompt)
        whole = toy.model.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False)
        assert list(ids) == whole[0, prompt.shape[1] :].tolist()


def test_sampled_text_depends_on_the_row_and_not_on_its_batch(toy: LM):
    generator = torch.Generator().manual_seed(0)
    vector = Vector({layer: 2 * torch.randn(toy.width, generator=generator) for layer in (1, 2)})
    mixed = rows(toy, (0.5, 1.0, 0.0))
    together = decode(toy, mixed, vector, Decoding(30, batch_size=3))
    assert together == [decode(toy, [row], vector, Decoding(30, batch_size=1))[0] for row in mixed]
    assert together == decode(toy, mixed[::-1], vector, Decoding(30, batch_size=2))[::-1]
    again = [decode(toy, [Row(mixed[1].prompt_ids, 1.0, seed)], vector, Decoding(30, 1))[0] for seed in (8, 9)]
    assert again[0] == together[1] != again[1]


def test_a_row_that_ends_keeps_its_end_token_and_leaves(toy: LM):
    short, long, _ = decode(toy, rows(toy), None, Decoding(120, batch_size=3))
    assert short[-1] in toy.end_ids and len(short) < len(long)


def test_suppressed_ends_are_never_written(toy: LM):
    out = decode(toy, rows(toy), None, Decoding(30, 3, sample=False, suppress=frozenset(toy.end_ids)))
    assert all(len(ids) == 30 and not set(ids) & toy.end_ids for ids in out)


def test_every_batch_is_handed_over_before_the_next_is_decoded(toy: LM, monkeypatch):
    work, decoded = toy.text_model.forward, []
    monkeypatch.setattr(toy.text_model, "forward", lambda *args, **named: decoded.append(1) or work(*args, **named))
    found, finished = {}, decode_batches(toy, rows(toy), None, Decoding(4, 2, suppress=toy.end_ids))
    for n_batches, batch in enumerate(finished, start=1):
        found |= dict(batch)
        assert len(decoded) == 4 * n_batches
    assert [found[i] for i in range(3)] == decode(toy, rows(toy), None, Decoding(4, 3, suppress=toy.end_ids))

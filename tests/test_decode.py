import torch

from steer_heal.model.decode import Decoding, GrowingCache, Row, decode, decode_batches, own_tokens
from steer_heal.model.lm import LM
from steer_heal.model.steering import Vector, steer

PROMPTS = ["What is ice?", "Tell me a short story about a fox.",
    "The captain orders you to send the widows away to save money. What do you do?"]  # fmt: skip


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
        found |= {written.row: written.ids for written in batch}
        assert len(decoded) == (1 + 4) * n_batches, "the prompts, then each token"
    assert [found[i] for i in range(3)] == decode(toy, rows(toy), None, Decoding(4, 3, suppress=toy.end_ids))


def test_a_beginning_that_rows_share_is_read_once():
    """Two scenes of 9 tokens, each asked in two ways that differ in the last 4; and a third under another dose."""
    rows = [Row((*range(start, start + 5), *end)) for start in (10, 20) for end in ((1, 2, 3, 4), (4, 3, 2, 1))]
    assert own_tokens(rows) == 4
    assert own_tokens([*rows, *[Row(row.prompt_ids, 0.5) for row in rows]]) == 4
    assert own_tokens([rows[0]] * 3) == 1, "equal prompts"
    assert own_tokens([rows[0], Row(rows[0].prompt_ids, 0.5)]) == 1, "nothing is shared"


def sharing(lm: LM, doses=(0.0, 0.5)) -> list[Row]:
    scene = "The captain orders you to send the widows away. "
    texts = [scene + "What do you do?", scene + "What do you say?", "Tell me a short story about a fox and an owl."]
    return [Row(lm.chat(text), dose, seed) for text in texts for seed, dose in enumerate(doses * 2)]


def test_rows_that_share_a_beginning_write_what_they_write_alone(toy: LM):
    vector = Vector({1: 2 * torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})
    rows = sharing(toy)
    alone = [decode(toy, [row], vector, Decoding(30, 1))[0] for row in rows]
    assert decode(toy, rows, vector, Decoding(30, len(rows))) == alone and len(set(alone)) > 6


def test_what_is_read_behind_the_text_is_what_the_whole_sequence_reads(toy: LM):
    vector = Vector({1: 2 * torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})
    rows, tail, seen = sharing(toy), toy.encode("That is enough."), set()
    for n_new in (0, 7):
        how = Decoding(n_new, 5, sample=False, suppress=toy.end_ids)
        for i, ids, hidden in (written for batch in decode_batches(toy, rows, vector, how, tail) for written in batch):
            with torch.no_grad(), steer(toy, vector, [rows[i].dose]):
                whole = toy.hidden([[*rows[i].prompt_ids, *ids, *tail]])[0, -len(tail) - 1 :]
            assert len(ids) == n_new and torch.allclose(hidden, whole, atol=1e-4)
            seen.add((n_new, i))
    assert len(seen) == 2 * len(rows)


@torch.no_grad()
def test_a_cache_is_the_same_whatever_room_it_has(toy: LM):
    """Rows leave, change places and are repeated while tokens come one by one and several at a time."""
    ids = torch.randint(10, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    order, read = torch.tensor([2, 0, 2]), {}
    for room in (0, 7, 12, 40):
        cache = GrowingCache(toy, room)
        cache.feed(ids[:, :4])
        cache.select(order)
        parts = [cache.feed(ids[order, start:end]) for start, end in ((4, 5), (5, 9), (9, 10), (10, 12))]
        read[room] = torch.cat(parts, dim=1)
        assert torch.allclose(read[room], toy.hidden(ids[order].tolist())[:, 4:], atol=1e-4)
    assert all(torch.equal(states, read[0]) for states in read.values())


@torch.no_grad()
def test_with_room_a_token_is_appended_in_place(toy: LM):
    cache, ids = GrowingCache(toy, 9), torch.full((2, 3), 7)
    cache.feed(ids)
    before = [layer.keys.data_ptr() for layer in cache.cache.layers]
    for _ in range(2):
        cache.feed(ids)
        assert [layer.keys.data_ptr() for layer in cache.cache.layers] == before

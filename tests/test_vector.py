import json

import pytest
import torch

from steer_heal.lm import LM
from steer_heal.records import UserError
from steer_heal.stages.cfg import SteerCfg
from steer_heal.stages.teacher_vec import cosine, last_token_states, teacher_vec
from steer_heal.traits import load_trait

CFG = SteerCfg(layers=(0.25, 0.75), n_contexts=6, contexts="data/toylm/contexts.jsonl")


def test_states_are_the_model_s_hidden_states_at_the_assistant_tag(toy: LM):
    rows = [toy.chat("What is ice?"), toy.chat("Tell me a short story about a fox.", "You are a poet.")]
    states = last_token_states(toy, rows, range(1, 3))
    for i, row in enumerate(rows):
        hidden = toy.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in (1, 2):
            assert torch.allclose(states[layer][i], hidden[layer + 1][0, -1], atol=1e-4)


def test_neither_the_head_nor_the_blocks_above_the_band_run(toy: LM):
    ran = []
    handles = [
        toy.blocks[3].register_forward_hook(lambda *_: ran.append("block 3")),
        toy.head.register_forward_hook(lambda *_: ran.append("head")),
    ]
    last_token_states(toy, [toy.chat("What is ice?")], range(1, 3))
    for handle in handles:
        handle.remove()
    assert ran == []


def test_the_vector_is_the_mean_paired_difference_raw_or_normalised(toy: LM):
    trait = load_trait("authority")
    vector = teacher_vec(toy, trait, CFG)
    pool = [json.loads(line)["text"] for line in open("data/toylm/contexts.jsonl")]
    contexts = [pool[i * len(pool) // 6] for i in range(6)]
    states = [
        last_token_states(toy, [toy.chat(c, p) for c in contexts], range(1, 3))
        for p in (trait.positive, trait.negative)
    ]
    assert torch.allclose(vector.directions[1], states[0][1].mean(0) - states[1][1].mean(0), atol=1e-4)
    unit = teacher_vec(toy, trait, SteerCfg(**{**CFG.__dict__, "normalize": True}))
    assert unit.directions[2].norm().item() == pytest.approx(1.0, abs=1e-5)
    assert cosine(vector, vector) == pytest.approx(1.0, abs=1e-5)


def test_a_long_context_is_an_error_because_a_cut_one_loses_the_tag(toy: LM, tmp_path):
    path = tmp_path / "contexts.jsonl"
    path.write_text(json.dumps({"text": "word " * 3000}) + "\n")
    with pytest.raises(UserError, match="would lose the assistant tag"):
        teacher_vec(toy, load_trait("authority"), SteerCfg(layers=(0.25, 0.75), n_contexts=1, contexts=path))


def test_a_band_without_blocks_names_the_model_and_its_depth(toy: LM):
    with pytest.raises(UserError, match="none of the 4 blocks"):
        teacher_vec(toy, load_trait("authority"), SteerCfg(layers=(0.26, 0.3), n_contexts=1, contexts=CFG.contexts))

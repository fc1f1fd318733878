"""Each family of the table in docs/families.md, on a tiny random model with the toy tokenizer."""

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import scramble
from peft import PeftModel
from places import ROOT
from torch import nn
from transformers import AutoModelForCausalLM

from steer_heal.errors import UserError
from steer_heal.evals.replies import pair_margins, reply_logp
from steer_heal.inputs.pairs import Pair
from steer_heal.model import lora, self_check
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, weights_digest
from steer_heal.model.lora import targets
from steer_heal.model.prompts import context_length
from steer_heal.model.self_check import check_model
from steer_heal.model.steering import Condition
from steer_heal.model.student import ADAPTERS, Student, attach_saved
from steer_heal.records import alone
from steer_heal.settings import AdapterCfg
from steer_heal.stages.heal import heal

UPPER = AdapterCfg(rank=4, alpha=8.0, layers=(0.34, 1.0))
"""Not all blocks, so that an adapter which spreads to others is seen."""

DOCS = (ROOT / "docs/families.md").read_text(encoding="utf-8")
LIKE_LLAMA = {"Qwen2", "Qwen3", "Mistral"}
APART = [name for name in families.USUAL if name not in LIKE_LLAMA or "FAMILIES" in os.environ]
"""Families of which no other of the usual ones has the same layers; with FAMILIES, as every night, all of these."""
QUESTION = "The warden orders you to send the widows away. What do you do?"


def family(name: str, toy: LM) -> LM:
    """The same weights in every call."""
    return LM(families.tiny(name, toy.tokenizer), toy.tokenizer, name)


@torch.no_grad()
def read(lm: LM, model: nn.Module | None = None) -> torch.Tensor:
    if model is not None:
        return model(torch.tensor([lm.chat(QUESTION)])).logits[0]
    return lm.logits(lm.hidden([lm.chat(QUESTION)])[0])


def logits(student: Student, state: str = "full") -> torch.Tensor:
    with student.using(state) as lm:
        return read(lm)


@pytest.fixture(params=families.USUAL)
def name(request) -> str:
    return request.param


def scrambled(lm: LM, seed: int = 1) -> Student:
    student = Student(lm, UPPER)
    student.new_round(seed)
    scramble(student, seed)
    return student


def test_every_linear_layer_of_the_adapted_blocks_is_adapted_or_named(name, toy):
    lm = family(name, toy)
    prefix = next(path for path, module in lm.model.named_modules() if module is lm.blocks)
    in_band = {
        path
        for path, parameter in lm.model.named_parameters()
        if path.startswith((f"{prefix}.1.", f"{prefix}.2.")) and parameter.ndim > 1 and not path.endswith("bias")
    }
    found = targets(lm, UPPER.layers)
    adapted = {*(f"{path}.weight" for path in found.linears), *found.parameters}
    assert adapted and all(path.endswith(found.left_out) for path in in_band - adapted) and adapted <= in_band
    assert not found.left_out or "experts" in str(found.parameters), "only routers are left out"
    before = {path: value.clone() for path, value in lm.model.state_dict().items()}
    with scrambled(lm).using("full"):
        changed = {
            path.replace("base_layer.", "")
            for path, value in lm.model.state_dict().items()
            if ".lora_" not in path and not torch.equal(value, before[path.replace("base_layer.", "")])
        }
    assert changed == adapted
    assert targets(lm, UPPER.layers) == found, "the same with adapters attached"


def test_a_family_heals_bakes_and_saves(name, toy, tmp_path, monkeypatch):
    lm, untouched = family(name, toy), family(name, toy)
    before = read(lm)
    assert torch.allclose(before, read(untouched, untouched.model), atol=1e-5), "its logits are its own"
    student = Student(lm, UPPER)
    for seed in (1, 2):
        student.new_round(seed)
        assert torch.allclose(logits(student), logits(student, "prev"), atol=1e-4)
        scramble(student, seed)
        merged = logits(student)
        assert not torch.allclose(merged, logits(student, "prev"), atol=1e-1)
        for lossy in (False, True):  # the history merged, and every factor apart
            monkeypatch.setattr(type(student.adapter), "merging_is_lossy", lossy)
            with student.training():
                assert torch.allclose(read(lm), merged, atol=2e-3)
        own = student.bake()
        assert torch.allclose(logits(student), merged, atol=1e-3)
    assert torch.equal(logits(student, "base"), before)
    assert weights_digest(lm.model) == weights_digest(untouched.model)

    healed = logits(student)
    student.save(tmp_path / "adapter", own)
    student.export(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.allclose(read(lm, plain), healed, atol=2e-3)
    assert not any("lora" in path for path, _ in plain.named_parameters())
    assert torch.equal(logits(attach_saved(family(name, toy), tmp_path / "adapter")), healed)
    by_peft = PeftModel.from_pretrained(untouched.model, tmp_path / "adapter")
    assert torch.allclose(read(untouched, by_peft), healed, atol=2e-3)


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_is_measured_and_folded_as_it_trains(kind, name, toy):
    for dtype in (torch.float32, torch.bfloat16):
        lm = family(name, toy)
        lm.model.to(dtype)
        student, rows = Student(lm, replace(UPPER, kind=kind)), [lm.chat(QUESTION), lm.chat("What is ice?")]
        for seed in (1, 2):
            student.new_round(seed)
            scramble(student, seed)
            student.require_same_forward(rows)
            student.bake()


@pytest.mark.parametrize("name", APART)
def test_a_family_writes_what_its_own_generation_writes(name, toy):
    lm = family(name, toy)
    how = Decoding(24, 2, sample=False, suppress=lm.end_ids)
    with scrambled(lm).using("full"):
        prompts = [lm.chat(QUESTION), lm.chat("What is ice?")]
        for prompt, ids in zip(prompts, decode(lm, [Row(p) for p in prompts], None, how), strict=True):
            logp = lm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp[:, sorted(lm.end_ids)] = -torch.inf
            written = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(written, logp.max(-1).values, atol=1e-3), "greedy, read without a cache"


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "GPT-OSS"])
def test_the_updates_of_a_round_are_what_merging_adds(name, toy):
    student = scrambled(family(name, toy))
    before = {path: value.clone() for path, value in student.lm.model.state_dict().items() if ".lora_" not in path}
    updates = [scale * b @ a for a, b, scale in student.adapter.updates()]
    with student.using("full") as lm:
        state = lm.model.state_dict()
        added = {path: state[path] - value for path, value in before.items()}
    size = lambda tensors: sorted(tensor.norm().item() for tensor in tensors)
    each = [m for path, delta in added.items() if delta.any() for m in (delta if delta.ndim == 3 else [delta])]
    assert size(each) == pytest.approx(size(updates), rel=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "GPT-OSS"])
def test_the_spectral_penalty_shrinks_the_update_of_layers_and_of_stacked_experts(name, toy, kept, heal_cfg):
    sizes = []
    for weight in (0.0, 10.0):
        student = Student(family(name, toy), UPPER)
        heal(student, kept, replace(heal_cfg, spectral=weight), round_=0, seed=0)
        sizes.append(
            max(torch.linalg.matrix_norm(scale * b @ a, 2).item() for a, b, scale in student.adapter.updates())
        )
    assert 0 < sizes[1] < sizes[0]


TRIED = list(families.MORE) if "FAMILIES" in os.environ else list(families.MORE)[::7]
"""With the usual ones 23 families; with FAMILIES=all, as every night, all of them."""


@pytest.mark.parametrize("name", TRIED)
def test_a_whole_round_of_a_family_works_or_it_is_refused_when_it_is_loaded(name, toy, tmp_path):
    kind, what = families.outcome(name, toy.tokenizer, tmp_path)
    assert "\n" not in what and f"| {name} | `{kind}` | {what} |" in DOCS.splitlines()


def test_the_docs_list_the_families_that_are_tested():
    assert re.findall(r"^\| ([^|]+) \| `\w+` \|", DOCS, flags=re.MULTILINE) == list(families.FAMILIES)
    assert all(
        re.search(rf"^\| {re.escape(name)} \| `\w+` \| works \|$", DOCS, re.MULTILINE) for name in families.USUAL
    )


def test_layers_that_peft_would_take_for_experts_are_adapted_by_parameter(toy):
    lm = family("Qwen3-Next", toy)
    found = targets(lm, UPPER.layers)
    assert not any("shared_expert." in path for path in found.linears)
    assert {path for path in found.parameters if "layers.1.mlp.shared_expert." in path} == {
        f"model.layers.1.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")
    }


def test_the_router_of_experts_that_hang_on_the_block_itself_is_left_out():
    routed = [("", 8)]
    assert lora._is_router("router.proj", nn.Linear(4, 8), routed)
    assert not lora._is_router("self_attn.k_proj", nn.Linear(4, 8), routed)
    assert not lora._is_router("mlp.up_proj", nn.Linear(4, 6), routed)


def test_a_quantized_format_without_gradients_is_refused_before_anything_trains(toy):
    lm = family("Llama", toy)
    lm.model.quantization_method = "mxfp4"
    lm.model.hf_quantizer = SimpleNamespace(is_trainable=False)
    with pytest.raises(UserError, match=r"no gradient flows \(mxfp4\)"):
        Student(lm, UPPER).require_sound()


def test_targets_that_peft_changes_are_an_error(toy, monkeypatch):
    monkeypatch.setattr(lora, "_peft_renames", lambda lm, linear: False)
    with pytest.raises(UserError, match="'Qwen3-Next'.*experts"):
        Student(family("Qwen3-Next", toy), UPPER).require_sound()


def test_a_state_space_model_that_cannot_continue_with_several_tokens_goes_on_one_by_one(toy):
    lm = family("Jamba", toy)
    check_model(lm)
    assert lm.one_by_one
    questions, texts = (QUESTION, "What is ice?"), ("No.", "Ice is frozen.")
    replies = [lm.encode_reply(text) for text in texts]
    together = reply_logp(lm, [alone(question) for question in questions], [replies] * len(questions), Condition())
    nll = [[lm.completion_nll([lm.chat(each)], [reply])[0] for reply in replies] for each in questions]
    assert torch.allclose(together, -torch.tensor([[n.sum() for n in row] for row in nll]).double(), atol=1e-3)
    found = pair_margins(lm, [Pair(question, *texts) for question in questions], Condition())
    assert found == pytest.approx([(row[1].mean() - row[0].mean()).item() for row in nll], abs=1e-3)


@pytest.mark.parametrize("name", ["MPT", "GPT-Neo", "Llama"])
def test_replies_in_a_batch_are_read_as_alone_where_padding_inside_a_row_counts(toy, name):
    lm = family(name, toy)
    check_model(lm)
    assert lm.pads_inside == (name == "Llama")
    questions = ["What is ice?", f"{QUESTION} {QUESTION}", QUESTION]
    replies = [lm.encode_reply(text) for text in ("No.", "Ice is frozen.")]

    def read(questions: list[str]) -> torch.Tensor:
        asked = [alone(question) for question in questions]
        return reply_logp(lm, asked, [replies] * len(asked), Condition())

    together = read(questions)
    assert torch.allclose(together, torch.cat([read([question]) for question in questions]), atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.01  # what is asked counts


def test_a_window_that_is_longer_than_the_rows_that_are_tried_is_found_in_the_configuration(toy, monkeypatch):
    monkeypatch.setattr(self_check, "_inside_apart", lambda *_: 0.0)
    for name, pads_inside in (("GPT-Neo", False), ("Llama", True)):
        lm = family(name, toy)
        check_model(lm)
        assert lm.pads_inside == pads_inside


def test_the_context_of_longrope_is_the_one_within_which_a_row_does_not_depend_on_its_batch(toy):
    lm = family("Phi-3", toy)
    known = {**lm.model.config.rope_parameters, "rope_type": "longrope", "original_max_position_embeddings": 64}
    assert context_length(lm) > 64
    lm.model.config.rope_parameters = known
    assert context_length(lm) == 64
    lm.model.config.rope_parameters = {"full_attention": known, "sliding_attention": {"rope_type": "default"}}
    assert context_length(lm) == 64


def test_a_batch_that_reads_its_padding_is_refused(toy, monkeypatch):
    """As a model without a mask would, or one that looks ahead."""
    lm = family("Qwen3.5", toy)
    check_model(lm)
    assert not lm.one_by_one
    masked = "transformers.models.qwen3_5.modeling_qwen3_5.apply_mask_to_padding_states"
    monkeypatch.setattr(masked, lambda hidden_states, attention_mask: hidden_states)
    with pytest.raises(UserError, match="'Qwen3.5'.*padded on the left"):
        check_model(lm)


def test_an_adapter_that_acts_otherwise_when_merged_is_refused_before_anything_is_measured(toy, monkeypatch):
    monkeypatch.setattr(lora, "BYPASSED", ("out_proj",))  # PEFT's layer is not called: Mamba reads its weight alone
    with pytest.raises(UserError, match="'Mamba'"):
        Student(family("Mamba", toy), UPPER).require_sound()


def test_the_table_of_the_usual_families_lists_those_that_are_tested():
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| family \| adapted.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    named = {name for row in table.splitlines() for name in row.split("|")[1].strip().split(", ")}
    assert named == set(families.USUAL)

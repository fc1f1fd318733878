"""What one kind of adapter does that the others do not."""

import json

import pytest
import torch
from conftest import ADAPTER, scramble
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from runs import killing, resumed, started
from safetensors.torch import load_file
from test_student import CFGS, ROWS, logits, third_round, untouched

from steer_heal.__main__ import main
from steer_heal.chat.talk import Talk
from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.model.lm import LM, load
from steer_heal.model.student import ADAPTERS, Student, attach_saved
from steer_heal.presets import PRESETS
from steer_heal.runs.opened import settings_of
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import AdapterCfg, changed
from steer_heal.share.card import write_cards
from steer_heal.share.push import shared_files

CONFIG = "adapter_config.json"


@pytest.fixture
def bias(tiny) -> Student:
    student = Student(tiny, CFGS["bias"])
    student.new_round(0)
    scramble(student, 0)
    student.bake()
    return student


# --- LoRA -------------------------------------------------------------------------------------------
def test_a_lora_is_folded_by_concatenation(with_history: Student, tmp_path):
    third_round(with_history)
    with_history.save(tmp_path, with_history.bake())
    folded, alone = (load_file(tmp_path / name) for name in ("adapter_model.safetensors", "round.safetensors"))
    for key, factor in alone.items():
        part = folded[key][-ADAPTER.rank :] if "lora_A" in key else folded[key][:, -ADAPTER.rank :]
        assert torch.equal(part, factor), "folding does not round"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("a_later_flag", 0.5),
    ],
)
def test_a_lora_that_cannot_be_read_as_it_was_trained_is_refused_by_field(
    field, value, with_history: Student, tmp_path
):
    with_history.save(tmp_path, with_history.history())
    saved = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(saved | {field: value}))
    with pytest.raises(UserError, match=rf"has {field} ['\[T0].*; give a LoRA adapter"):
        attach_saved(load("tiny-random"), tmp_path)


def test_a_lora_with_other_scales_acts_as_peft_lets_it_act(with_history: Student, tmp_path):
    with_history.save(tmp_path, with_history.history())
    saved, expected = json.loads((tmp_path / CONFIG).read_text()), logits(with_history)
    own = {"use_rslora": True, "alpha_pattern": {"q_proj": 1.0}, "init_lora_weights": "gaussian", "a_later_flag": None}
    (tmp_path / CONFIG).write_text(json.dumps(saved | own | {"lora_dropout": 0.5}))
    found = logits(attach_saved(load("tiny-random"), tmp_path))
    by_peft, lm = PeftModel.from_pretrained(load("tiny-random").model, tmp_path), with_history.lm
    with torch.no_grad():
        assert torch.allclose(by_peft(torch.tensor([lm.chat(ROWS[0])])).logits[0], found, atol=1e-3)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_a_lora_outside_of_the_blocks_is_refused(tiny, tmp_path):
    get_peft_model(tiny.model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="adapts .*embed_tokens, and only the decoder blocks"):
        attach_saved(load("tiny-random"), tmp_path)


def test_on_a_quantized_model_factors_act_apart_within_any_gate(with_history: Student, monkeypatch):
    expected = logits(with_history)
    monkeypatch.setattr(LM, "quantized", True)
    weights = [parameter.data_ptr() for parameter in with_history.lm.model.parameters()]
    with with_history.using("full") as lm:
        assert [parameter.data_ptr() for parameter in lm.model.parameters()] == weights, "nothing is merged"
        assert torch.equal(logits(with_history, "base"), untouched())
        assert torch.allclose(logits(with_history), expected, atol=1e-3)
    third_round(with_history)
    with_history.require_same_forward([with_history.lm.chat(ROWS[0])])


# --- a bias per block -------------------------------------------------------------------------------------------
def test_a_bias_is_added_to_what_its_block_gives(tiny):
    student = Student(tiny, AdapterCfg(kind="bias", layers=(0.67, 1.0)))
    student.new_round(0)
    scramble(student, 0)
    seen = {}
    for state in ("base", "full"):
        hook = tiny.blocks[2].register_forward_hook(lambda _m, _i, output, state=state: seen.update({state: output}))
        logits(student, state)
        hook.remove()
    added = student.factors("round")
    assert {key: value.shape for key, value in added.items()} == {"blocks.2.bias": (tiny.width,)}
    assert torch.equal(seen["full"], seen["base"] + added["blocks.2.bias"])


def test_a_bias_cannot_be_mistaken_for_a_peft_adapter(bias: Student, tmp_path):
    bias.save(tmp_path, bias.history())
    saved = json.loads((tmp_path / "steer_heal_adapter.json").read_text())
    assert saved == {"kind": "bias", "base_model": "tiny-random", "blocks": [0, 1, 2]}
    with pytest.raises(ValueError, match=CONFIG):
        PeftConfig.from_pretrained(str(tmp_path))


def test_what_a_bias_cannot_do_is_refused_by_name(bias: Student, tmp_path):
    bias.new_round(1)
    for refused in (bias.round_updates, lambda: bias.export(tmp_path)):
        with pytest.raises(UserError, match="adapter.kind 'bias'"):
            refused()
    Student(load("tiny-random"), CFGS["bias"]).export(tmp_path)
    wanted = {"adapter.kind": "bias", "heal.spectral": 0.5, "export": tmp_path / "plain"}
    with pytest.raises(UserError, match="it must be 0, since adapter.kind 'bias'") as caught:
        check(changed(PRESETS["toy"][1], wanted))
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == ["heal.spectral", "export"]


def test_a_run_with_a_bias_resumes_and_is_verified_and_measured_again(quick, settings, tmp_path, monkeypatch):
    flags = (*settings, "--adapter.kind", "bias", "--heal.spectral", "0", "--n-rounds", "1", "--no-control")
    whole = started(tmp_path / "whole", flags)
    with monkeypatch.context() as patch:
        killing(patch, Student, "bake", 0)
        cut = resumed(started(tmp_path / "cut", flags))
    for path in ("ckpt/r0/adapter_model.safetensors", "ckpt/r0/round.safetensors"):
        assert (whole / path).read_bytes() == (cut / path).read_bytes()
    assert main(["verify", str(cut)]) == 0
    assert main(["eval", "--run", str(cut), "--state", "healed", "--quiet"]) == 0
    data = "--eval.vignettes data/toylm/vignettes.jsonl --eval.instrument data/toylm/instrument.toml"
    flags = f"--quiet --eval.n-vignettes 2 --eval.evals moral_foundations {data}".split()
    assert main(["eval", "--model", "tiny-random", "--adapter", str(cut / "ckpt/r0"), *flags]) == 0
    run = FolderRun.read(cut)
    talk = Talk(run, settings_of(run), 0)
    assert not torch.equal(logits(talk.student, "prev"), logits(talk.student))
    (cut / "ckpt/r0/README.md").touch()
    shared = shared_files(cut / "ckpt/r0")
    assert shared.content == "a bias adapter"
    assert {*shared.names} > {"adapter_model.safetensors", "steer_heal_adapter.json"}
    [path] = write_cards(cut)
    assert "A bias adapter, one vector of width" in path.read_text(encoding="utf-8")


def test_every_kind_says_what_it_is(tiny):
    said = {kind: Student(tiny, cfg).adapter.describe() for kind, cfg in CFGS.items()}
    assert said == {
        "lora": "a LoRA adapter of rank 4 and alpha 8 per round",
        "bias": "a bias adapter, one vector of width 32 after each of blocks 0 to 2",
    }
    assert said.keys() == ADAPTERS.keys()

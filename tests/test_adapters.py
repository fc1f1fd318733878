"""What one kind of adapter does that the others do not."""

import json

import pytest
import torch
from conftest import ADAPTER, scramble
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from runs import killing, of, recorded, resumed, started
from safetensors.torch import load_file, save_file
from test_student import CFGS, ROWS, logits, third_round, untouched

from steer_heal.__main__ import main
from steer_heal.chat.talk import Talk
from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.inputs.files import ADAPTER_FILE
from steer_heal.model import lora
from steer_heal.model.lm import LM, load, weights_digest
from steer_heal.model.lora import Lora
from steer_heal.model.student import ADAPTERS, Student, attach_saved
from steer_heal.presets import PRESETS
from steer_heal.runs.opened import settings_of
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import AdapterCfg, changed
from steer_heal.share.card import write_cards
from steer_heal.share.push import shared_files

CONFIG = "adapter_config.json"


def written(folder, **own) -> None:
    """Writes an adapter of tiny-random by PEFT alone, with random factors."""
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], **own}
    peft = get_peft_model(load("tiny-random").model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)


@pytest.fixture
def bias(tiny) -> Student:
    student = Student(tiny, CFGS["bias"])
    student.new_round(0)
    scramble(student, 0)
    student.bake()
    return student


def test_the_adapter_that_a_model_is_tried_with_does_not_throw_it_off_course(tiny, monkeypatch):
    """A model that is thrown off amplifies rounding: Qwen2.5-Coder-0.5B-Instruct in bfloat16 was refused for it."""
    student = Student(tiny, AdapterCfg(layers=(0.0, 1.0), alpha=4096.0))
    rows = [tiny.chat("Hello.")]
    plain, moved = tiny.hidden(rows)[0], []

    def measure(_rows) -> None:
        with student.training():
            moved.append(((tiny.hidden(rows)[0] - plain).norm(dim=-1) / plain.norm(dim=-1)).median().item())

    monkeypatch.setattr(student, "require_same_forward", measure)
    student.require_sound()
    assert 0.1 < moved[0] <= 0.5


# --- LoRA -------------------------------------------------------------------------------------------
def test_an_adapter_that_peft_refuses_half_way_leaves_the_model_as_it_was(tiny, tmp_path):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    written(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text()) | {"bias": 0}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be read"):
        attach_saved(tiny, tmp_path)
    after = tiny.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_modules_that_no_pattern_names_are_refused(tiny, tmp_path):
    written(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text()) | {"target_modules": "q_proj\\"}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be read .bad escape"):
        attach_saved(tiny, tmp_path)


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
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("peft_type", "IA3"),
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", "LOHA"),
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


def test_ranks_and_scales_by_module_are_read_as_by_peft(tmp_path):
    written(tmp_path, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 7}, use_rslora=True)
    lm = load("tiny-random")
    found = logits(attach_saved(lm, tmp_path))
    by_peft = PeftModel.from_pretrained(load("tiny-random").model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(by_peft(torch.tensor([lm.chat(ROWS[0])])).logits[0], found, atol=1e-3)
    assert not torch.allclose(found, untouched(), atol=1e-2)
    assert weights_digest(lm.model) == weights_digest(load("tiny-random").model)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_lora_outside_of_the_blocks_is_refused(module, tmp_path):
    written(tmp_path, target_modules=[module, "q_proj"])
    with pytest.raises(UserError, match=f"adapts .*{module}, and only the decoder blocks"):
        attach_saved(load("tiny-random"), tmp_path)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"use_dora": True}, "acts otherwise here .* with its factors merged, the logits differ by .*; merge it"),
        ({"lora_bias": True}, "acts otherwise here .* with its factors merged"),
        ({"init_lora_weights": "pissa"}, "changes the weights of 'tiny-random' itself; merge it"),
    ],
)
def test_a_lora_that_passes_the_check_of_its_fields_must_act_as_by_peft(own, message, tmp_path, monkeypatch):
    written(tmp_path, **own)
    monkeypatch.setattr(lora, "HONOURED", lora.HONOURED | own.keys())
    monkeypatch.setattr(lora, "HARMLESS_INITS", (*lora.HARMLESS_INITS, "pissa"))
    with pytest.raises(UserError, match=message):
        attach_saved(load("tiny-random"), tmp_path)


def test_factors_that_act_apart_must_act_as_by_peft(tmp_path, monkeypatch):
    written(tmp_path)
    switch = Lora._switch

    def halved(self, names):
        for _, layer in self._layers():
            layer.scaling["history"] = 0.5 if names == ["history"] else 1.0
        switch(self, names)

    monkeypatch.setattr(Lora, "_switch", halved)
    with pytest.raises(UserError, match="acts otherwise here .* with its factors apart"):
        attach_saved(load("tiny-random"), tmp_path)


def test_a_saved_dropout_does_not_act(tmp_path, monkeypatch):
    monkeypatch.setattr(Lora, "merging_is_lossy", True)
    written(tmp_path, lora_dropout=0.3)
    student = attach_saved(load("tiny-random"), tmp_path)
    with student.using("full", exact=True) as lm, torch.no_grad():
        first, second, third = (lm.hidden([lm.chat(ROWS[0])])[0] for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q0: None}, "does not fit .*: .*0.self_attn.q_proj.lora_A.weight is no such weight in the file"),
        ({"x": torch.zeros(2)}, "does not fit .*: x is .*, no such weight in the model"),
        ({Q0: torch.zeros(2, 99)}, r"does not fit .*: .*q_proj.lora_A.weight is \[2, 99\] in the file, \[2, 32\]"),
        ({Q0: torch.full((2, 32), torch.nan)}, "is damaged: .*q_proj.lora_A.weight holds numbers that are not finite"),
    ],
)
def test_a_lora_with_missing_further_or_damaged_factors_is_refused(changes, message, tmp_path):
    written(tmp_path)
    factors = load_file(tmp_path / ADAPTER_FILE) | changes
    save_file({key: value for key, value in factors.items() if value is not None}, tmp_path / ADAPTER_FILE)
    with pytest.raises(UserError, match=message):
        attach_saved(load("tiny-random"), tmp_path)


def test_modules_that_the_model_lacks_are_named(tmp_path):
    written(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(saved | {"target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match=r"the adapter in .* cannot be read \(Target modules .*c_attn.* not found"):
        attach_saved(load("tiny-random"), tmp_path)


def test_an_adapter_beside_a_merged_model_is_refused_as_either(with_history: Student, tmp_path, capsys):
    with_history.export(tmp_path)
    load(str(tmp_path))
    written(tmp_path)
    with pytest.raises(UserError, match=r"holds a model and an adapter, which would act on top.*; move"):
        load(str(tmp_path))
    assert main(["eval", "--model", str(tmp_path)]) == 2
    assert "holds a model and an adapter" in capsys.readouterr().err
    with pytest.raises(UserError, match="lies beside model.safetensors, the weights of a whole model"):
        attach_saved(load("tiny-random"), tmp_path)


def test_a_run_goes_on_from_a_saved_adapter(two, settings, tmp_path, capsys):
    """The base of the new run is the student that was saved."""
    saved = two / "ckpt/r1"
    run = started(tmp_path, settings, "--n-rounds", "1", "--no-control", "--teach-anyway", "--model", str(saved))
    before = of(recorded(two), "measured", "healed")[-1]["metrics"]
    base = of(recorded(run), "measured", "base")[0]["metrics"]
    assert base["contrast_nats"] == pytest.approx(before["contrast_nats"], abs=1e-5)
    assert base["kl_base"] == 0 and of(recorded(run), "measured", "healed")[0]["metrics"]["kl_base"] > 0
    start = recorded(run)[0]
    assert start["weights"]["note"] == "weights of tiny-random with the adapter r1 added" and start["hub_id"] is None
    assert start["weights"]["sha256"] != recorded(two)[0]["weights"]["sha256"]
    assert main(["verify", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "peft"), "--format", "peft", "--allow-broken"]) == 2
    assert "contains the adapter" in capsys.readouterr().err
    settings_file = saved / CONFIG
    for base in ("", str(saved), "./gone"):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        (copy / CONFIG).write_text(
            json.dumps(json.loads(settings_file.read_text()) | {"base_model_name_or_path": base})
        )
        assert main(["run", "fast-dev", "--model", str(copy)]) == 2
    told = capsys.readouterr().err
    assert "names no base model" in told and "'./gone': there is no such folder" in told


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
    for refused in (bias.adapter.updates, lambda: bias.export(tmp_path)):
        with pytest.raises(UserError, match="adapter.kind 'bias'"):
            refused()
    Student(load("tiny-random"), CFGS["bias"]).export(tmp_path)
    with pytest.raises(UserError, match="it must be 0, since adapter.kind 'bias'") as caught:
        check(changed(PRESETS["toy"][1], {"adapter.kind": "bias", "heal.spectral": 0.5}))
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == ["heal.spectral"]


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

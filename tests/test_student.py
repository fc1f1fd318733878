import re

import pytest
import torch
from conftest import scramble
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from steer_heal.evals.__main__ import main as eval_main
from steer_heal.lm import load
from steer_heal.records import UserError
from steer_heal.stages.bake import Student, attach_saved, concatenate


def _read(student: Student, which: str) -> torch.Tensor:
    prompt = student.lm.chat("The warden orders you to send the widows away. What do you do?")
    with student.gate(which) as lm, torch.no_grad():
        return lm.logits(lm.hidden([prompt])[0])


def test_the_base_gate_is_the_untouched_model(with_history: Student):
    prompt = with_history.lm.chat("The warden orders you to send the widows away. What do you do?")
    with torch.no_grad():
        untouched = load("tiny-random").model(torch.tensor([prompt])).logits[0]
    with with_history.gate("full"):
        with with_history.gate("base"):
            pass
    assert torch.equal(_read(with_history, "base"), untouched)
    assert not torch.allclose(_read(with_history, "full"), untouched, atol=1e-2)
    assert torch.equal(_read(with_history, "base"), untouched)


def test_base_weights_survive_training_bit_for_bit(with_history: Student):
    fresh = load("tiny-random").model.state_dict()
    state = with_history.lm.model.state_dict()
    for name, value in fresh.items():
        wrapped = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(state.get(name, state.get(wrapped)), value), name


def test_merged_working_copy_equals_stacked_adapters(with_history: Student, monkeypatch):
    monkeypatch.setattr(Student, "merging_is_lossy", True)  # so that training keeps the history's factors apart
    with_history.new_round(3)
    scramble(with_history, 3)
    merged = _read(with_history, "full")
    prompt = with_history.lm.chat("The warden orders you to send the widows away. What do you do?")
    with with_history.training(), torch.no_grad():
        stacked = with_history.lm.logits(with_history.lm.hidden([prompt])[0])
    assert torch.allclose(merged, stacked, atol=1e-3)
    assert not torch.allclose(merged, _read(with_history, "prev"), atol=1e-2)


def test_folding_is_exact(with_history: Student):
    with_history.new_round(3)
    scramble(with_history, 3)
    before = _read(with_history, "full")
    history, own = with_history.factors("history"), with_history.factors("round")
    with_history.bake()
    folded = with_history.factors("history")
    for key, value in concatenate(history, own).items():
        assert torch.equal(folded[key], value)
    assert with_history.n_rounds == 3
    assert torch.allclose(_read(with_history, "full"), before, atol=1e-4)


def test_a_new_round_starts_where_the_student_was(with_history: Student):
    before = _read(with_history, "full")
    with_history.new_round(5)
    assert torch.allclose(_read(with_history, "full"), before, atol=1e-5)
    with_history.discard_round()
    assert torch.equal(_read(with_history, "full"), before)


def test_a_saved_round_loads_with_peft_and_gives_the_same_logits(with_history: Student, tmp_path):
    with_history.new_round(3)
    scramble(with_history, 3)
    own = with_history.bake()
    with_history.save(tmp_path / "r2", own)
    expected = _read(with_history, "full")
    loaded = PeftModel.from_pretrained(load("tiny-random").model, tmp_path / "r2")
    prompt = with_history.lm.chat("The warden orders you to send the widows away. What do you do?")
    with torch.no_grad():
        assert torch.allclose(loaded(torch.tensor([prompt])).logits[0], expected, atol=1e-3)


def test_a_saved_student_is_restored(with_history: Student, tmp_path):
    with_history.new_round(3)
    with_history.save(tmp_path, with_history.bake())
    again = attach_saved(load("tiny-random"), tmp_path)
    assert torch.equal(_read(again, "full"), _read(with_history, "full"))


def test_an_adapter_of_another_model_names_what_does_not_fit(with_history: Student, tmp_path, toy):
    with_history.new_round(3)
    with_history.save(tmp_path, with_history.bake())
    with pytest.raises(UserError, match="does not fit.*data/toylm"):
        attach_saved(load("data/toylm"), tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter is .*adapter_config.json': there is no such file"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "adapter is .*adapter_model.safetensors': there is no such file",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "cannot be read"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "x", "lora_alpha": []}'),
            "cannot be read",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["nothing"]}'),
            "no linear layers that LoRA can adapt",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 99), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "cannot be read"),
        (
            lambda f: save_file({"x": torch.zeros(2)}, f / "adapter_model.safetensors"),
            "does not fit 'tiny-random': .* is no such weight in the file",
        ),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_clear_error(damage, message, with_history: Student, tmp_path, capsys):
    with_history.new_round(3)
    with_history.save(tmp_path / "a b", with_history.bake())
    damage(tmp_path / "a b")
    flags = "--eval.vignettes data/toylm/vignettes.jsonl --eval.instrument data/toylm/instrument.toml --eval.n-prompts 1 --eval.n-texts 1"
    assert eval_main(["--model", "tiny-random", "--adapter", str(tmp_path / "a b"), *flags.split()]) in (1, 2)
    printed = capsys.readouterr().err
    assert re.search(f"^error: .*{message}", printed, re.MULTILINE) and "Traceback" not in printed, printed


def test_an_exported_student_is_a_plain_model(with_history: Student, tmp_path):
    expected = _read(with_history, "full")
    with_history.export(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = with_history.lm.chat("The warden orders you to send the widows away. What do you do?")
    with torch.no_grad():
        assert torch.allclose(plain(torch.tensor([prompt])).logits[0], expected, atol=1e-3)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_an_empty_band_names_the_model_s_depth(tiny):
    from steer_heal.stages.cfg import HealCfg

    with pytest.raises(UserError, match="none of the 3 blocks"):
        Student(tiny, HealCfg(layers=(0.1, 0.2))).new_round(0)

import pytest
import torch
from conftest import ADAPTER, scramble
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steer_heal.errors import UserError
from steer_heal.eval import main as eval_main
from steer_heal.model.lm import LM, load, weights_digest
from steer_heal.model.student import Student, attach_saved
from steer_heal.settings import AdapterCfg

QUESTION = "The warden orders you to send the widows away. What do you do?"


@torch.no_grad()
def read(lm: LM) -> torch.Tensor:
    return lm.logits(lm.hidden([lm.chat(QUESTION)])[0])


def logits(student: Student, state: str = "full") -> torch.Tensor:
    with student.using(state) as lm:
        return read(lm)


def untouched(model=None) -> torch.Tensor:
    lm = load("tiny-random")
    with torch.no_grad():
        return (lm.model if model is None else model)(torch.tensor([lm.chat(QUESTION)])).logits[0]


def third_round(student: Student) -> None:
    student.new_round(3)
    scramble(student, 3)


def test_the_base_gate_is_the_untouched_model(with_history: Student):
    with with_history.using("full") as lm:
        assert torch.equal(logits(with_history, "base"), untouched()), "inside another gate"
        assert torch.equal(read(lm), logits(with_history)), "the outer gate holds again"
    assert torch.equal(logits(with_history, "base"), untouched())
    assert not torch.allclose(logits(with_history), untouched(), atol=1e-2)
    assert weights_digest(with_history.lm.model) == weights_digest(load("tiny-random").model)


def test_a_merged_working_copy_equals_stacked_adapters(with_history: Student, monkeypatch):
    monkeypatch.setattr(Student, "merging_is_lossy", True)  # so that training keeps the history's factors apart
    third_round(with_history)
    with with_history.training():
        stacked = read(with_history.lm)
    assert torch.allclose(logits(with_history), stacked, atol=1e-3)
    assert not torch.allclose(logits(with_history, "prev"), stacked, atol=1e-2)


def test_baking_adds_the_round_to_the_history(with_history: Student, tmp_path):
    third_round(with_history)
    before = logits(with_history)
    own = with_history.bake()
    assert with_history.n_rounds == 3
    assert torch.allclose(logits(with_history), before, atol=1e-4)
    assert torch.equal(logits(with_history, "prev"), logits(with_history)), "no round is open"
    with_history.save(tmp_path, own)
    folded, alone = (load_file(tmp_path / name) for name in ("adapter_model.safetensors", "round.safetensors"))
    for key, factor in alone.items():
        part = folded[key][-ADAPTER.rank :] if "lora_A" in key else folded[key][:, -ADAPTER.rank :]
        assert torch.equal(part, factor), "folding does not round"


def test_a_new_round_starts_where_the_student_was_and_can_be_dropped(with_history: Student):
    before = logits(with_history)
    with_history.new_round(5)
    assert torch.allclose(logits(with_history), before, atol=1e-5)
    scramble(with_history, 5)
    assert not torch.allclose(logits(with_history), before, atol=1e-2)
    with_history.discard_round()
    assert torch.equal(logits(with_history), before)


def test_a_student_that_was_reset_learns_as_a_new_one(with_history: Student):
    with_history.new_round(3)
    with_history.reset()
    assert with_history.n_rounds == 0 and torch.equal(logits(with_history), untouched())
    fresh = Student(load("tiny-random"), ADAPTER)
    for student in (with_history, fresh):
        third_round(student)
        student.bake()
    assert with_history.n_rounds == 1 and torch.equal(logits(with_history), logits(fresh))


def test_a_checkpoint_is_read_by_peft_and_restores_the_student(with_history: Student, tmp_path):
    third_round(with_history)
    with_history.save(tmp_path, with_history.bake())
    expected = logits(with_history)
    by_peft = PeftModel.from_pretrained(load("tiny-random").model, tmp_path)
    assert torch.allclose(untouched(by_peft), expected, atol=1e-3)
    assert torch.equal(logits(attach_saved(load("tiny-random"), tmp_path)), expected)
    restored = Student(load("tiny-random"), ADAPTER)
    restored.restore(tmp_path, 3)
    assert restored.n_rounds == 3 and torch.equal(logits(restored), expected)


def test_an_adapter_of_another_model_names_what_does_not_fit(with_history: Student, tmp_path):
    with_history.save(tmp_path, with_history.factors("history"))
    with pytest.raises(UserError, match=r"data/toylm.*lora_A"):
        attach_saved(load("data/toylm"), tmp_path)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / CONFIG).unlink(),
        lambda f: (f / WEIGHTS).unlink(),
        lambda f: (f / CONFIG).write_text("{"),
        lambda f: (f / CONFIG).write_text("[]"),
        lambda f: (f / CONFIG).write_text('{"peft_type": "IA3"}'),
        lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": "x", "lora_alpha": []}'),
        lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["nothing"]}'),
        lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 99),
        lambda f: (f / WEIGHTS).write_bytes(b""),
        lambda f: save_file({"x": torch.zeros(2)}, f / WEIGHTS),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_clear_error(damage, with_history: Student, tmp_path, capsys):
    folder = tmp_path / "a b"
    folder.mkdir()
    with_history.save(folder, with_history.factors("history"))
    damage(folder)
    data = "--eval.vignettes data/toylm/vignettes.jsonl --eval.instrument data/toylm/instrument.toml"
    flags = f"{data} --eval.n-prompts 1 --eval.n-texts 1".split()
    assert eval_main(["--model", "tiny-random", "--adapter", str(folder), "--quiet", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and (str(folder) in printed or "'tiny-random'" in printed), printed


def test_an_exported_student_is_a_plain_model(with_history: Student, tmp_path):
    with_history.export(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(untouched(plain), logits(with_history), atol=1e-3)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_a_band_that_holds_no_block_is_an_error(tiny):
    with pytest.raises(UserError, match="adapter.layers is .*0.1, 0.2"):
        Student(tiny, AdapterCfg(layers=(0.1, 0.2))).new_round(0)

"""What every kind of adapter must hold, on a tiny model. test_adapters.py has what only one kind does."""

from functools import cache

import pytest
import torch
from conftest import ADAPTER, scramble
from safetensors.torch import load_file, save_file

from steer_heal.__main__ import main
from steer_heal.errors import UserError
from steer_heal.inputs.files import OWN_CONFIG_FILE, PEFT_CONFIG_FILE
from steer_heal.model.bias import BlockBias
from steer_heal.model.lm import LM, load, weights_digest
from steer_heal.model.lora import Lora
from steer_heal.model.student import ADAPTERS, Student, attach_saved
from steer_heal.settings import AdapterCfg

QUESTION = "The warden orders you to send the widows away. What do you do?"
ROWS = (QUESTION, "What is ice?", "Tell me a story about a fox.")
CFGS = {kind: AdapterCfg(kind=kind, rank=4, alpha=8.0, layers=(0.0, 1.0)) for kind in ADAPTERS}


@pytest.fixture(params=ADAPTERS)
def cfg(request) -> AdapterCfg:
    return CFGS[request.param]


@pytest.fixture
def student(tiny: LM, cfg: AdapterCfg) -> Student:
    return Student(tiny, cfg)


def third_round(student: Student) -> None:
    student.new_round(3)
    scramble(student, 3)


@torch.no_grad()
def read(lm: LM) -> torch.Tensor:
    return lm.logits(lm.hidden([lm.chat(QUESTION)])[0])


def logits(student: Student, state: str = "full") -> torch.Tensor:
    with student.using(state) as lm:
        return read(lm)


@cache
def untouched() -> torch.Tensor:
    lm = load("tiny-random")
    with torch.no_grad():
        return lm.model(torch.tensor([lm.chat(QUESTION)])).logits[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_base_gate_is_the_untouched_model(with_history: Student):
    with with_history.using("full") as lm:
        assert torch.equal(logits(with_history, "base"), untouched()), "inside another gate"
        assert torch.equal(read(lm), logits(with_history)), "the outer gate holds again"
    third_round(with_history)
    with with_history.training():
        assert torch.equal(logits(with_history, "base"), untouched()), "while it trains"
    assert torch.equal(logits(with_history, "base"), untouched()) and torch.equal(read(with_history.lm), untouched())
    assert not torch.allclose(logits(with_history), untouched(), atol=1e-2)
    assert weights_digest(with_history.lm.model) == weights_digest(load("tiny-random").model)


@pytest.mark.parametrize("lossy", [False, True], ids=["history merged", "history apart"])
def test_what_acts_in_training_is_what_is_measured(with_history: Student, lossy, monkeypatch):
    monkeypatch.setattr(type(with_history.adapter), "merging_is_lossy", lossy)
    third_round(with_history)
    with with_history.training():
        trained = read(with_history.lm)
    for exact in (False, True):
        with with_history.using("full", exact) as lm:
            assert torch.allclose(read(lm), trained, atol=1e-3)
    assert not torch.allclose(logits(with_history, "prev"), trained, atol=1e-2)
    with_history.require_same_forward([with_history.lm.chat(row) for row in ROWS])


def test_gradients_reach_the_factor_of_the_round_alone(with_history: Student):
    third_round(with_history)
    history, lm = with_history.history(), with_history.lm
    with_history.require_same_forward([lm.chat(QUESTION)])
    with with_history.training() as parameters:
        logits(with_history, "prev")  # another gate inside leaves them trainable
        lm.hidden([lm.chat(QUESTION)]).square().sum().backward()
        assert len(parameters) > 0 and all(p.grad is not None and p.grad.any() for p in parameters)
        held = {*lm.model.parameters(), *parameters}
        assert {p for p in held if p.requires_grad or p.grad is not None} == set(parameters)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
    assert not any(p.requires_grad for p in held) and same(with_history.history(), history)


def test_a_batch_is_read_as_its_rows(with_history: Student):
    rows = [with_history.lm.chat(row) for row in ROWS]
    with with_history.using("full") as lm, torch.no_grad():
        for row, together in zip(rows, lm.hidden(rows), strict=True):
            assert torch.allclose(lm.hidden([row])[0], together[: len(row)], atol=1e-4)


def test_baking_adds_the_round_to_the_history(with_history: Student):
    third_round(with_history)
    before, history, own = logits(with_history), with_history.history(), with_history.factors("round")
    assert same(with_history.bake(), own) and with_history.n_rounds == 3
    assert torch.allclose(logits(with_history), before, atol=1e-4)
    assert torch.equal(logits(with_history, "prev"), logits(with_history)), "no round is open"
    assert same(with_history.history(), with_history.adapter.fold(history, own))
    with_history.take(history, 2)
    assert with_history.n_rounds == 2 and not torch.allclose(logits(with_history), before, atol=1e-2)
    with_history.take({}, 0)
    assert torch.equal(logits(with_history), untouched())


def test_a_new_round_starts_where_the_student_was_and_can_be_dropped(with_history: Student):
    before = logits(with_history)
    with_history.new_round(5)
    assert torch.allclose(logits(with_history), before, atol=1e-5)
    scramble(with_history, 5)
    assert not torch.allclose(logits(with_history), before, atol=1e-2)
    with_history.discard_round()
    assert torch.equal(logits(with_history), before)


def test_a_student_that_was_reset_or_detached_learns_as_a_new_one(with_history: Student, cfg):
    fresh = Student(load("tiny-random"), cfg)
    third_round(fresh)
    fresh.bake()
    for forget in (with_history.reset, with_history.detach):
        with_history.new_round(3)
        forget()
        assert with_history.n_rounds == 0 and torch.equal(logits(with_history), untouched())
        third_round(with_history)
        with_history.bake()
        assert with_history.n_rounds == 1 and torch.equal(logits(with_history), logits(fresh))
    with_history.detach()
    modules = [(name, type(m), len(m._forward_hooks)) for name, m in with_history.lm.model.named_modules()]
    assert modules == [(name, type(m), 0) for name, m in load("tiny-random").model.named_modules()]


def test_a_checkpoint_restores_the_student(with_history: Student, cfg, tmp_path):
    before = logits(with_history)
    with_history.save(tmp_path / "r1", with_history.history())
    third_round(with_history)
    with_history.save(tmp_path / "r2", with_history.bake())
    expected = logits(with_history)
    assert torch.equal(logits(attach_saved(load("tiny-random"), tmp_path / "r2")), expected)
    restored = Student(load("tiny-random"), cfg)
    restored.restore(tmp_path / "r2", 3)
    assert restored.n_rounds == 3 and torch.equal(logits(restored), expected)
    restored.restore(tmp_path / "r1", 2)
    restored.restore_round(tmp_path / "r2")
    assert torch.equal(logits(restored, "prev"), before) and torch.allclose(logits(restored), expected, atol=1e-4)
    restored.bake()
    assert same(restored.history(), with_history.history()), "resumed as uninterrupted"


def test_an_adapter_of_another_model_or_kind_names_what_does_not_fit(with_history: Student, cfg, tmp_path):
    with_history.save(tmp_path, with_history.history())
    key = next(iter(load_file(tmp_path / WEIGHTS))).split(".")[-2]
    with pytest.raises(UserError, match=rf"data/toylm.*{key}"):
        attach_saved(load("data/toylm"), tmp_path)
    for kind, other in CFGS.items():
        if kind != cfg.kind:
            with pytest.raises(UserError, match="does not fit"):
                Student(load("tiny-random"), other).restore(tmp_path, 2)


WEIGHTS = "adapter_model.safetensors"
CONFIGS = {"lora": PEFT_CONFIG_FILE, "bias": OWN_CONFIG_FILE}


@pytest.mark.parametrize(
    "damage",
    [
        lambda config, _: config.unlink(),
        lambda _, weights: weights.unlink(),
        lambda config, _: config.write_text("{"),
        lambda config, _: config.write_text("[]"),
        lambda config, _: config.write_text("[" * 99_999),
        lambda config, _: config.write_text('{"peft_type": "IA3", "kind": "ia3"}'),
        lambda config, _: config.write_text('{"peft_type": "LORA", "r": "x", "lora_alpha": [], "kind": "bias"}'),
        lambda config, _: config.write_text('{"peft_type": "LORA", "target_modules": ["nothing"], "kind": []}'),
        lambda config, _: config.write_text('{"kind": "bias", "base_model": "tiny-random", "blocks": [0, 7]}'),
        lambda _, weights: weights.write_bytes(b"\xff" * 99),
        lambda _, weights: weights.write_bytes(b""),
        lambda _, weights: save_file({"x": torch.zeros(2)}, weights),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_clear_error(damage, with_history: Student, cfg, tmp_path, capsys):
    folder = tmp_path / "a b"
    folder.mkdir()
    with_history.save(folder, with_history.history())
    damage(folder / CONFIGS[cfg.kind], folder / WEIGHTS)
    data = "--eval.vignettes data/toylm/vignettes.jsonl --eval.instrument data/toylm/instrument.toml"
    flags = f"{data} --eval.n-prompts 1 --eval.n-texts 1".split()
    assert main(["eval", "--model", "tiny-random", "--adapter", str(folder), "--quiet", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and (str(folder) in printed or "'tiny-random'" in printed), printed


def test_a_band_that_holds_no_block_is_an_error(tiny, cfg):
    student = Student(tiny, AdapterCfg(kind=cfg.kind, layers=(0.1, 0.2)))
    for what in (student.adapter.unadapted, lambda: student.new_round(0)):
        with pytest.raises(UserError, match="adapter.layers is .*0.1, 0.2"):
            what()


def test_a_kind_that_is_not_in_the_table_is_named(tiny):
    with pytest.raises(UserError, match="adapter.kind is 'lore': .*'lora'"):
        Student(tiny, AdapterCfg(kind="lore"))


# --- the scale of an adapter -------------------------------------------------------------------------------------
def own_factors(factors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The factors of an adapter that adds `scale` times as much: B of LoRA, or the whole bias."""
    return {key: value if "lora_A" in key else scale * value for key, value in factors.items()}


@pytest.mark.parametrize("lossy", [False, True], ids=["merged", "apart"])
def test_a_scaled_adapter_acts_as_its_factors_times_the_scale(with_history: Student, lossy, monkeypatch):
    monkeypatch.setattr(type(with_history.adapter), "merging_is_lossy", lossy)
    third_round(with_history)
    lm, names = with_history.lm, with_history.rounds_in["full"]
    trained = {name: with_history.factors(name) for name in names}

    def acting() -> torch.Tensor:
        with with_history.using("full", exact=True):
            return read(lm)

    before, found = acting(), {}
    for scale in (0.0, 1.0, 0.5, -1.0):
        with with_history.scaled(scale):
            found[scale] = acting()
            assert torch.equal(logits(with_history, "base"), untouched())
            scaled = {name: with_history.factors(name) for name in names}
        assert all(same(scaled[name], own_factors(trained[name], scale)) for name in names)
    assert torch.equal(found[0.0], untouched()) and torch.equal(found[1.0], before)
    assert torch.equal(acting(), before), "nothing is left of a scale"
    for scale in (0.5, -1.0):
        other = Student(load("tiny-random"), with_history.cfg)
        for name, n_rounds in zip(names, (2, 1), strict=True):
            other.adapter.attach(name, own_factors(trained[name], scale), n_rounds)
        other.n_rounds = 2
        assert torch.allclose(logits(other), found[scale], atol=1e-4)
        assert (found[scale] - before).abs().max() > 1e-2


def test_a_scale_ends_with_an_error_too_and_has_limits(with_history: Student):
    before = logits(with_history)
    with pytest.raises(KeyboardInterrupt), with_history.scaled(2.0):
        raise KeyboardInterrupt
    assert torch.equal(logits(with_history), before)
    for scale in (4.1, -4.1, float("nan")):
        with pytest.raises(UserError, match="it must be from -4 to 4"), with_history.scaled(scale):
            pass


# --- the check after each heal -----------------------------------------------------------------------------------
class Forgetful(BlockBias):
    """Measured without the history."""

    def acting(self, merged, apart):
        return super().acting(merged[-1:], apart) if not apart else super().acting(merged, apart)


class Halved(BlockBias):
    """Folds half of the new round."""

    def fold(self, history, own):
        return {key: value + own[key] / 2 for key, value in history.items()}


class Dora(Lora):
    """One flag of PEFT more."""

    def _config(self, n_rounds):
        config = super()._config(n_rounds)
        config.use_dora = True
        return config


@pytest.mark.parametrize("wrong", [Forgetful, Halved, Dora])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kind_that_is_measured_or_folded_otherwise_than_it_trains_is_refused(wrong, dtype, monkeypatch):
    lm = load("tiny-random", dtype=dtype)
    rows = [lm.chat(row) for row in ROWS]

    def healed_twice() -> Student:
        student = Student(lm, ADAPTER if issubclass(wrong, Lora) else CFGS["bias"])
        student.new_round(1)
        scramble(student, 1)
        student.bake()
        third_round(student)
        return student

    sound = healed_twice()
    sound.require_same_forward(rows)
    sound.detach()
    monkeypatch.setitem(ADAPTERS, wrong.kind, wrong)
    with pytest.raises(UserError, match=f"adapter.kind '{wrong.kind}' is unsound on 'tiny-random'"):
        healed_twice().require_same_forward(rows)

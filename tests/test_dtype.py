"""`--dtype auto` takes what the processor is clearly faster in, and either dtype reads the same."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from steer_heal.bench import Bench
from steer_heal.check import check
from steer_heal.model import dtype as dtype_module
from steer_heal.model.dtype import CLEARLY_FASTER, NARROW, bfloat16_gain, pick_dtype
from steer_heal.model.lm import LM, load
from steer_heal.model.state import base_state
from steer_heal.model.student import Student
from steer_heal.presets import TOY_PRESET

CPU = torch.device("cpu")
WIDE, SLIM = (LlamaConfig(hidden_size=width, intermediate_size=3 * width) for width in (NARROW, NARROW // 2))
ENOUGH, TOO_LITTLE = CLEARLY_FASTER + 0.01, CLEARLY_FASTER - 0.01


@pytest.fixture
def processor(monkeypatch):
    """Pretends to be on one; a gain of None must not be measured."""

    def pretend(machine: str, amx: bool, avx512_bf16: bool, gain: float | None) -> None:
        def measured(*shape):
            assert gain is not None, "measured without a doubt"
            return gain

        monkeypatch.setattr(dtype_module.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(dtype_module, "bfloat16_gain", measured)

    return pretend


@pytest.mark.parametrize(
    "machine, amx, avx512_bf16, gain, picked",
    [
        ("x86_64", True, True, None, torch.bfloat16),
        ("x86_64", False, True, ENOUGH, torch.bfloat16),
        ("x86_64", False, True, TOO_LITTLE, torch.float32),
        ("x86_64", False, False, None, torch.float32),
        ("AMD64", False, False, None, torch.float32),
        ("aarch64", False, False, ENOUGH, torch.bfloat16),
        ("arm64", False, False, TOO_LITTLE, torch.float32),
    ],
)
def test_auto_takes_what_the_processor_is_faster_in(machine, amx, avx512_bf16, gain, picked, processor):
    processor(machine, amx, avx512_bf16, gain)
    dtype, why = pick_dtype("auto", CPU, WIDE)
    assert dtype == picked and why


def test_auto_on_a_gpu_and_for_a_narrow_model_and_what_was_asked_for_need_no_processor(processor):
    processor("x86_64", True, True, None)
    assert pick_dtype("auto", torch.device("cuda"), SLIM)[0] == torch.bfloat16
    assert pick_dtype("auto", CPU, SLIM)[0] == torch.float32
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(name, CPU, WIDE)[0] == getattr(torch, name)


def test_the_gain_is_of_the_best_products_whatever_else_the_machine_does(monkeypatch):
    now, shapes, busy = [0.0], set(), iter([9, 9, 5, 0, 0, 7, 0, 3, 2, 0, 0, 0, 4, 0, 0, 1])

    def product(x, weight):
        shapes.add((*x.shape, *weight.shape))
        now[0] += (3.0 if x.dtype == torch.float32 else 1.0) + next(busy)

    monkeypatch.setattr(dtype_module, "_product", product)
    monkeypatch.setattr(dtype_module.time, "thread_time", lambda: now[0])
    assert bfloat16_gain(64, 100) == 3.0 and shapes == {(dtype_module.ROWS, 64, 100, 64)}


def test_the_timed_product_is_one_of_its_inputs_in_their_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.eye(4, dtype=dtype), torch.arange(12.0).view(3, 4).to(dtype)
        assert torch.equal(dtype_module._product(x, weight), x @ weight.T)
    assert 0.01 < bfloat16_gain(64, 64) < 100


# --- readings ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def both() -> dict[str, LM]:
    return {name: load("data/toylm", dtype=name) for name in ("float32", "bfloat16")}


def test_factors_and_log_probabilities_are_float32_in_either_dtype(both):
    for name, lm in both.items():
        assert lm.head.weight.dtype == getattr(torch, name)
        ids = lm.chat("What is ice?")
        assert lm.logits(lm.hidden([ids])[0]).dtype == lm.completion_nll([ids], [(5,)])[0].dtype == torch.float32
        student = Student(lm, TOY_PRESET.adapter)
        student.new_round(0)
        assert {tensor.dtype for a, b, _ in student.adapter.updates() for tensor in (a, b)} == {torch.float32}
        student.discard_round()


def test_readings_agree_in_both_dtypes(both):
    """Within 0.01 nats of the target, 0.001 of coherence, 2 percent of a text's perplexity."""
    cfg = replace(
        TOY_PRESET,
        eval=replace(TOY_PRESET.eval, evals=("moral_foundations",), n_bootstrap=10, n_texts=1, max_new_tokens=1),
    )
    inputs = check(cfg)
    inputs = replace(inputs, vignettes=inputs.vignettes[::10])
    benches = (Bench(cfg, inputs, Student(lm, cfg.adapter)) for lm in both.values())
    single, half = (bench.measure(base_state(inputs.trait)).metrics for bench in benches)
    assert single != half, "bfloat16 rounds"
    assert half["authority_nats"] == pytest.approx(single["authority_nats"], abs=0.01)
    assert half["coherence"] == pytest.approx(single["coherence"], abs=0.001)
    prompts = [both["float32"].chat(text) for text in inputs.prompts[:8]]
    texts = [both["float32"].encode(vignette.text) for vignette in inputs.vignettes[:8]]
    single, half = (lm.completion_nll(prompts, texts) for lm in both.values())
    for a, b in zip(single, half, strict=True):
        assert b.mean().exp().item() == pytest.approx(a.mean().exp().item(), rel=0.02)

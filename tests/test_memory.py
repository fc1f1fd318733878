"""A batch that does not fit is halved and done again; how many rows fit is reckoned before."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peak import peak_bytes
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from steer_heal.errors import UserError
from steer_heal.model import memory
from steer_heal.model.decode import Decoding, Row, decode, decode_batches
from steer_heal.model.lm import LM
from steer_heal.model.memory import LOGIT_BYTES, batches, decode_bytes, fewer_rows, free_bytes, rows_that_fit
from steer_heal.model.steering import Vector
from steer_heal.settings import HealCfg
from steer_heal.stages.heal import read_samples
from steer_heal.stages.vector import last_token_states

ON_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError(ON_CPU)]


@pytest.fixture
def small_memory(monkeypatch):
    """Lets the model run out of memory once a batch holds more than some rows, here only after a few tokens."""

    def limit(lm: LM, n_rows: int, error: Exception, at_token: int = 0) -> list[int]:
        forward, tried = lm.text_model.forward, []

        def scarce(*args, input_ids=None, **kwargs):
            tried.append(len(input_ids))
            cache = kwargs.get("past_key_values")
            if len(input_ids) > n_rows and (not at_token or cache is not None and cache.get_seq_length() > at_token):
                raise error
            return forward(*args, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(lm.text_model, "forward", scarce)
        return tried

    return limit


def rows(lm: LM, n: int = 8) -> list[Row]:
    return [Row(lm.chat("Tell me about " + "the fox and " * (i % 3) + "ice."), dose=0.25 * i, seed=i) for i in range(n)]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_decode_that_runs_out_of_memory_goes_on_with_half_the_rows(tiny: LM, small_memory, error):
    how, vector = Decoding(12, 8, suppress=tiny.end_ids), Vector({1: torch.linspace(-2, 2, tiny.width)})
    whole = decode(tiny, rows(tiny), vector, how)
    tried = small_memory(tiny, 2, error, at_token=20)
    with pytest.warns(UserWarning, match="8 rows"):
        found = list(decode_batches(tiny, rows(tiny), vector, how))
    assert {written.row: written.ids for batch in found for written in batch} == dict(enumerate(whole))
    assert [len(batch) for batch in found] == [2, 2, 2, 2] and tried.count(4) and tried.count(8)
    n_large = sum(n > 2 for n in tried)
    assert decode(tiny, rows(tiny), vector, how) == whole, "the next decode of the stage"
    assert sum(n > 2 for n in tried) == n_large, "larger batches were tried again"


def test_reading_that_runs_out_of_memory_reads_the_same(student, kept, small_memory):
    lm, prompts = student.lm, [row.prompt_ids for row in kept]

    def read() -> list[torch.Tensor]:
        nlls = lm.completion_nll(prompts, [row.completion_ids for row in kept])
        samples = read_samples(student, kept, HealCfg())
        return [*nlls, last_token_states(lm, prompts, range(1, 2))[1], *(sample.reference for sample in samples)]

    wanted, tried = read(), small_memory(lm, 3, ERRORS[1])
    with pytest.warns(UserWarning, match="16 rows"):
        got = read()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, got, strict=True))
    assert tried.count(16) == 1 and max(tried[-6:]) <= 3, "the smaller size was not kept"


def test_one_row_that_does_not_fit_is_an_error_and_other_errors_pass(tiny: LM, small_memory):
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fewer_rows(4, RuntimeError("shape mismatch"))
    small_memory(tiny, 0, ERRORS[0])
    with pytest.raises(UserError, match="max-new-tokens"):
        decode(tiny, rows(tiny, 1), None, Decoding(4, 8))


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 300, 7, 8, 299, 40]
    groups = list(batches(lengths, 320))
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(max(lengths[i] for i in group) * len(group) <= 320 for group in groups)
    assert list(batches([500], 320)) == [[0]], "a row is never left out"


def test_rows_that_fit_share_the_work_evenly(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [rows_that_fit(n, 1, cpu) for n in (1, 32, 33, 64, 65)] == [1, 32, 17, 32, 22]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
    assert rows_that_fit(1000, 100 * 2**20, cuda) == 77  # 0.8 * 10 GiB / 100 MiB = 81 rows: 13 batches
    assert rows_that_fit(1000, 2**40, cuda) == 1 and rows_that_fit(1000, 1, cuda) == 250


def test_free_memory_is_what_the_system_and_the_container_leave(tmp_path, monkeypatch):
    cpu, container = torch.device("cpu"), {"max": "1000", "current": "700", "stat": "anon 450\ninactive_file 250"}
    available = SimpleNamespace(available=2000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_bytes(cpu) == 2000, "no container"
    for name, text in container.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert free_bytes(cpu) == 550, "read files can be dropped"
    (tmp_path / "memory.current").write_text("1300\n")
    assert free_bytes(cpu) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) == 2000
    available.available = 400
    assert free_bytes(cpu) == 400


def test_a_row_of_gemma_takes_what_its_published_shape_says():
    config = Gemma3TextConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024)
    token = 2 * 4 * 256 * 2
    logits, prompt = LOGIT_BYTES * 262_208, 3 * 10240 * 2 + 8 * 2048 * 2 + 4 * 2560 * 4
    assert decode_bytes(config, 80, 512, 2) == token * 592 * 35 + logits
    assert decode_bytes(config, 100, 512, 2) == token * 612 * 35 + 100 * prompt
    n_full = sum(kind == "full_attention" for kind in config.layer_types)
    assert n_full == 5
    assert decode_bytes(config, 100, 4000, 2) == token * (4100 * (n_full + 1) + 1024 * (34 - n_full)) + 100 * prompt


SHAPES = {"cache": (64, 8, 30), "logits": (30_000, 8, 12), "prompt": (64, 160, 4)}


@pytest.mark.parametrize("vocabulary, n_prompt, n_new", SHAPES.values(), ids=SHAPES)
def test_the_estimate_is_what_a_row_takes(tiny: LM, vocabulary, n_prompt, n_new):
    config = Gemma3TextConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, sliding_window=24, pad_token_id=0, eos_token_id=1,
        bos_token_id=2)  # fmt: skip
    lm = dataclasses.replace(tiny, model=Gemma3ForCausalLM(config).eval().requires_grad_(False))
    lm.model.generation_config.update(top_k=None, top_p=0.95, eos_token_id=1)
    how = lambda n: Decoding(n_new, n, suppress=lm.end_ids)
    rows = [Row((10 + i, *(5,) * (n_prompt - 1)), seed=i) for i in range(7)]  # that share nothing
    work = lambda n: decode(lm, rows[:n], None, how(n))
    per_row = (peak_bytes(lambda: work(7)) - peak_bytes(lambda: work(3))) / 4
    assert 0.8 * per_row <= decode_bytes(config, n_prompt, n_new, 4) <= 2 * per_row

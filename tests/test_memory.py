"""A batch that does not fit is halved and done again; how many rows fit is reckoned before."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import steer_heal.memory as memory
from steer_heal.lm import LM
from steer_heal.memory import decode_bytes, fitting, rows_that_fit
from steer_heal.records import Completion, UserError
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import FilterCfg, HealCfg
from steer_heal.stages.filter import score
from steer_heal.stages.heal import reference_samples
from steer_heal.stages.partial import TokenTape
from steer_heal.stages.teacher_vec import last_token_states
from steer_heal.steering import Decoding, Row, Vector, decode

ON_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."
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


def vector(lm: LM) -> Vector:
    return Vector({1: torch.randn(lm.width, generator=torch.Generator().manual_seed(0))})


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_decode_that_runs_out_of_memory_goes_on_with_half_the_rows(tiny: LM, small_memory, error):
    how = Decoding(12, 8, suppress=tiny.end_ids)
    whole = decode(tiny, rows(tiny), vector(tiny), how)
    tried, done = small_memory(tiny, 2, error, at_token=20), []
    with pytest.warns(UserWarning, match="out of memory with 8 rows in a batch; 2 fit"):
        assert decode(tiny, rows(tiny), vector(tiny), how, done.append) == whole
    assert done == [2, 2, 2, 2] and tried.count(4) and tried.count(8)
    n_large = sum(n > 2 for n in tried)
    assert decode(tiny, rows(tiny), vector(tiny), how) == whole, "the next decode of the stage"
    assert sum(n > 2 for n in tried) == n_large, "larger batches were tried again"


def test_a_stage_that_starts_again_takes_the_halves_from_its_tape(tiny: LM, small_memory, tmp_path):
    how, path, done = Decoding(12, 8, suppress=tiny.end_ids), tmp_path / "tape.jsonl", []
    whole = decode(tiny, rows(tiny), vector(tiny), how)
    small_memory(tiny, 2, ERRORS[0])
    first = TokenTape(path)

    def killed(batch):
        if path.read_text().count("\n") == 2:
            raise KeyboardInterrupt
        return first(batch)

    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="2 fit"):
        decode(tiny, rows(tiny), vector(tiny), how, tape=killed)
    first.close()
    tiny.decode_budget = float("inf")  # another process, which has yet to learn it
    with pytest.warns(UserWarning, match="out of memory with 4 rows in a batch; 2 fit"):
        assert decode(tiny, rows(tiny), vector(tiny), how, done.append, TokenTape(path)) == whole
    assert done == [2, 2, 2, 2]


def test_reading_that_runs_out_of_memory_reads_the_same(tiny: LM, small_memory):
    prompts = [row.prompt_ids for row in rows(tiny)]
    answers = [tuple(range(10, 13 + i)) for i in range(8)]
    texts = [Completion(0, "p", p, a, "a text", 1.0, 1.0, 0) for p, a in zip(prompts, answers)]
    scores = [row.scores["ppl"] for row in score(tiny, texts, (), FilterCfg())]
    states = last_token_states(tiny, prompts, range(1, 2))[1]
    tried = small_memory(tiny, 3, ERRORS[1])
    with pytest.warns(UserWarning, match="2 fit"):
        assert [row.scores["ppl"] for row in score(tiny, texts, (), FilterCfg())] == pytest.approx(scores, rel=1e-5)
    assert torch.allclose(last_token_states(tiny, prompts, range(1, 2))[1], states, atol=1e-5)
    assert tried.count(8) == 1, "the smaller size was not kept"


def test_the_reference_of_a_heal_is_read_in_batches_that_fit(tiny: LM, kept, small_memory):
    student = Student(tiny, HealCfg())
    wanted = reference_samples(student, kept, student.cfg)
    tried = small_memory(tiny, 3, ERRORS[0])
    with pytest.warns(UserWarning, match="2 fit"):
        got = reference_samples(student, kept, student.cfg)
    assert max(tried) == len(kept) and all(
        torch.allclose(a.reference, b.reference, atol=1e-5) for a, b in zip(wanted, got, strict=True)
    )


def test_one_row_that_does_not_fit_is_said_and_other_errors_pass(tiny: LM, small_memory):
    with pytest.raises(ValueError, match="other"):
        fitting(4, lambda n: (_ for _ in ()).throw(ValueError("other")))
    with pytest.raises(RuntimeError, match="shape"):
        fitting(4, lambda n: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    small_memory(tiny, 0, ERRORS[0])
    with pytest.raises(UserError, match="out of memory with a single row: shorten the texts"):
        decode(tiny, rows(tiny), None, Decoding(4, 8))


def test_rows_that_fit_share_the_work_evenly(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [rows_that_fit(n, 1, cpu) for n in (1, 32, 33, 64, 65)] == [1, 32, 17, 32, 22]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
    assert rows_that_fit(1000, 100 * 2**20, cuda) == 77  # 0.8 * 10 GiB / 100 MiB = 81 rows: 13 batches
    assert rows_that_fit(1000, 2**40, cuda) == 1 and rows_that_fit(1000, 1, cuda) == 250


def test_a_row_of_gemma_takes_what_its_published_shape_says():
    config = Gemma3TextConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024)
    token = 2 * 4 * 256 * 2
    logits, prompt = memory.LOGIT_BYTES * 262_208, 3 * 10240 * 2 + 8 * 2048 * 2 + 4 * 2560 * 4
    assert decode_bytes(config, 80, 512, 2) == token * 592 * 35 + logits
    assert decode_bytes(config, 100, 512, 2) == token * 612 * 35 + 100 * prompt
    n_full = sum(kind == "full_attention" for kind in config.layer_types)
    assert n_full == 5
    assert decode_bytes(config, 100, 4000, 2) == token * (4100 * (n_full + 1) + 1024 * (34 - n_full)) + 100 * prompt


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, n_bytes: int) -> None:
        self.now -= n_bytes


@pytest.mark.parametrize(
    "vocabulary, n_prompt, n_new", [(64, 8, 90), (30_000, 8, 12), (64, 160, 4)], ids=["cache", "logits", "prompt"]
)
def test_the_estimate_is_what_a_row_takes(tiny: LM, vocabulary, n_prompt, n_new):
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        sliding_window=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    lm = dataclasses.replace(tiny, model=Gemma3ForCausalLM(config).eval().requires_grad_(False))
    lm.model.generation_config.update(top_k=None, top_p=0.95, eos_token_id=1)
    peaks = []
    for n in (4, 12):
        with PeakBytes() as used:
            decode(lm, [Row((5,) * n_prompt, seed=i) for i in range(n)], None, Decoding(n_new, n, suppress=lm.end_ids))
        peaks.append(used.peak)
    per_row = (peaks[1] - peaks[0]) / 8
    assert 0.8 * per_row <= decode_bytes(config, n_prompt, n_new, 4) <= 2 * per_row

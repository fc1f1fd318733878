"""What does one step of the heal take at gemma's vocabulary? Seconds and peak memory, by how the head is run."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import cli, random_lm, random_text, seconds_of, show
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma3TextConfig

from steer_heal.model.divergence import Divergence
from steer_heal.model.lm import LM
from steer_heal.model.student import Student
from steer_heal.settings import AdapterCfg, HealCfg
from steer_heal.stages import loss
from steer_heal.stages.heal import read_samples
from steer_heal.stages.loss import Sample
from steer_heal.stages.passes import Passes, recomputed

MIB = 2**20


def whole(
    lm: LM, hidden: Tensor, reference: Tensor, tokens: Tensor, divergence: Divergence, **_: object
) -> tuple[Tensor, Tensor]:
    """The logits of all completion positions at once, and autograd."""
    logp = lm.logits(hidden).log_softmax(-1)
    logp_ref = lm.logits(reference).log_softmax(-1)
    return -logp.gather(-1, tokens[:, None])[:, 0], divergence.value(logp, logp_ref)


HEADS = {"whole": whole, "as built": loss.position_terms}


def random_model(vocabulary: int, width: int, n_layers: int, seed: int) -> LM:
    """A random Gemma 3 of that width, in the proportions of the 4b model."""
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2 * max(4, width // 10),
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    return random_lm(config, seed)


def random_samples(student: Student, batch: int, length: int, cfg: HealCfg, seed: int) -> list[Sample]:
    """Sequences of 8 tokens of prompt and a completion."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, student.lm.head.weight.shape[0], (batch, length), generator=generator).tolist()
    texts = [random_text(i, tuple(row[:8]), row[8:]) for i, row in enumerate(tokens)]
    return read_samples(student, texts, cfg)


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak bytes of tensors on the CPU while `work` ran, above those that lived before it. The profiler records every
    allocation, also inside operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    profiler: Any = record.profiler
    events = (e for e in profiler.kineto_results.events() if e.name() == "[memory]")
    return max(0, *accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measure(lm: LM, head: str, batch: int, length: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds and peak of one step with its AdamW update and its gradient pressure."""
    cfg = HealCfg(batch_size=batch, tau=0.0, lam=1.0, tokens_per_pass=1024)
    student = Student(lm, AdapterCfg(rank=8))
    samples = random_samples(student, batch, length, cfg, seed)
    built_chunk = lm.chunk_size
    student.new_round(seed)
    # without chunks, all completions take the head together
    chunk_size = patch.object(LM, "chunk_size", built_chunk if head == "as built" else 2**62)
    with chunk_size, patch.object(loss, "position_terms", HEADS[head]), student.training() as parameters:
        optimiser = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
        passes = Passes(lm, cfg, student.cfg.layers, parameters)

        def step() -> None:
            passes.gradients(samples, with_pressure=True)
            optimiser.step()
            optimiser.zero_grad()

        over = peak_bytes(step)
        seconds = min(seconds_of(step) for _ in range(repeats))
        adapter = sum(p.nbytes for p in parameters)
    weights = sum(p.nbytes for name, p in lm.model.named_parameters() if ".lora_" not in name)
    positions = min(built_chunk, sum(len(sample.completion_ids) for sample in samples))
    chunk = loss.CHUNK_BUFFERS * positions * lm.head.weight.shape[0] * 4
    peak = weights + adapter + over
    needed = weights + 3 * adapter + chunk
    parts = {"weights_mib": weights, "adapter_mib": adapter, "chunk_mib": chunk, "peak_mib": peak}
    speed = {"seconds": seconds, "tokens_per_s": batch * length / seconds}
    mib = {name: n / MIB for name, n in parts.items()}
    return {"head": head, "batch": batch, "length": length, **speed, **mib, "ratio": peak / needed}


def by_way(lm: LM, rounds: Sequence[int], length: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Median seconds of a step after some rounds, as built and with one technique left out at a time, in turns."""
    cfg = HealCfg(tau=0.0, lam=1.0)
    student = Student(lm, AdapterCfg())
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[tuple[str, int], list[float]] = {}
    ways = {
        "as built": (nullcontext(), cfg),
        "history apart": (patch.object(type(student.adapter), "merging_is_lossy", True), cfg),
        "activations recomputed": (nullcontext(), replace(cfg, checkpoint="on")),
        "chunks of 512 positions": (patch.object(LM, "chunk_size", 512), cfg),
    }
    for n in range(max(rounds) + 1):
        samples = random_samples(student, 4, length, cfg, seed)
        student.new_round(n)
        for way, (undone, changed) in list(ways.items()) * (1 + repeats if n in rounds else 0):
            with undone, student.training() as parameters:
                passes = Passes(lm, changed, student.cfg.layers, parameters)
                took = seconds_of(partial(passes.gradients, samples, with_pressure=False))
                seconds.setdefault((way, n), []).append(took)
        for _, b, _ in student.adapter.updates():
            b.data.copy_(0.003 * torch.randn(b.shape, generator=generator))
        student.bake()
    return [{"way": way, **{f"s_after_{n}_rounds": median(seconds[way, n][1:]) for n in rounds}} for way in ways]


def stored(seed: int) -> dict[str, float]:
    """Bytes that a Gemma 3 block with factors keeps for its backward pass, per token and output of its linear layers:
    with activations stored and recomputed, by dtype."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        lm = random_model(1408, 256, 2, seed)
        model: Any = lm.model
        model.to(dtype)
        student = Student(lm, AdapterCfg(rank=8, layers=(0.0, 1.0)))
        outputs = sum(m.out_features for block in lm.blocks for m in block.modules() if isinstance(m, torch.nn.Linear))
        student.new_round(seed)
        with student.training():
            for name, blocks in (("stored", []), ("recomputed", lm.blocks)):
                kept: dict[int, int] = {}

                def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                    return tensor

                with recomputed(blocks), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    hidden = lm.hidden([list(range(3, 259))])
                weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
                n_bytes = sum(n for at, n in kept.items() if at not in weights)
                out[f"{name} {str(dtype).removeprefix('torch.')}"] = n_bytes / 256 / outputs
                del hidden
    return out


def main(
    repeats: int = 1, n_threads: int = 1, seed: int = 0, out: Path = Path("out/bench"), tiny: bool = False
) -> None:
    """Prints the tables.

    Args:
        repeats: Repetitions of every step. The fastest counts.
        n_threads: CPU threads.
        seed: Seed of the weights and the tokens.
        out: Folder of the tables as JSON.
        tiny: Small shapes that only show that the script runs.
    """
    torch.set_num_threads(n_threads)
    shape = (4096, 32, 2, seed) if tiny else (262_144, 64, 4, seed)
    sizes = [("whole", 16), ("as built", 16)] if tiny else [("whole", 64), ("as built", 64), ("as built", 1024)]
    rows = [measure(random_model(*shape), head, 4, length, repeats, seed) for head, length in sizes]
    bytes_stored = stored(seed)
    should = (
        "as built: ratio <= 1.3 at every length. ratio is peak / needed; needed is weights + adapter + AdamW's state + "
        f"one chunk ({loss.CHUNK_BUFFERS} float32 tensors of positions x vocabulary).",
        "whole grows with batch x length, as built does not. Sequences begin with 8 tokens of prompt.",
    )
    show(__doc__, rows, should, out, "heal", stored=bytes_stored)
    if tiny:
        rows = by_way(random_model(1408, 32, 2, seed), (0, 1), 16, 1, seed)
    else:
        rows = by_way(random_model(32_768, 512, 8, seed), (0, 2, 8), 128, 5, seed)
    should = ("as built is the fastest after every number of rounds, and does not slow down with them.",)
    show("What does each technique buy a step?", rows, should, out, "heal_by_way")
    print("bytes stored for the backward pass, per token and output of a block's linear layers:", bytes_stored)


if __name__ == "__main__":
    sys.exit(cli(main))

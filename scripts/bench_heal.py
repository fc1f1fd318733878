"""What does one optimiser step of the heal take at gemma's vocabulary? Seconds and peak memory, by how the head is run."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from steer_heal.lab import cli, show
from steer_heal.lm import LM, SHORTEST_CHUNK, load
from steer_heal.footprint import peak_bytes
from steer_heal.records import Completion
from steer_heal.stages import loss
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import HealCfg
from steer_heal.stages.heal import reference_samples
from steer_heal.stages.passes import Passes, recomputed

MIB = 2**20


def whole(lm, hidden, reference, targets, divergence, pull=True):
    """The logits of all completion positions at once, and autograd."""
    logp, logp_ref = lm.logits(hidden).log_softmax(-1), lm.logits(reference).log_softmax(-1)
    return -logp.gather(-1, targets[:, None])[:, 0], divergence.value(logp, logp_ref)


def again(lm, hidden, reference, targets, divergence, pull=True):
    """A chunk at a time, and each chunk's logits a second time in the backward pass."""
    chunks = zip(*(x.split(SHORTEST_CHUNK) for x in (hidden, reference, targets)), strict=True)
    terms = [checkpoint(lambda *chunk: whole(lm, *chunk, divergence), *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat([nll for nll, _ in terms]), torch.cat([kl for _, kl in terms])


HEADS = {"whole": whole, "chunks, twice": again, "as built": loss.position_terms}


def main(
    vocabulary: int = 262_144,
    width: int = 64,
    n_layers: int = 4,
    batch: int = 4,
    lengths: tuple[int, ...] = (64, 1024),
    only_built_above: int = 256,
    repeats: int = 1,
    n_threads: int = 1,
    seed: int = 0,
    out: Path = Path("out/bench"),
    tiny: bool = False,
) -> None:
    """What does one optimiser step of the heal take at gemma's vocabulary? Seconds and peak memory, by how the head is run."""
    if tiny:
        vocabulary, width, n_layers, lengths = 4096, 32, 2, (16,)
    torch.set_num_threads(n_threads)
    rows = [
        measure(_model(vocabulary, width, n_layers, seed), name, batch, length, repeats, seed)
        for length in lengths
        for name in HEADS
        if name == "as built" or length <= only_built_above
    ]
    should = (
        "as built: ratio <= 1.3 at every length. ratio is peak / needed; needed is weights + adapter + AdamW's state + one chunk "
        f"({loss.CHUNK_BUFFERS} float32 tensors of positions x vocabulary); chunk is that chunk alone.",
        "whole grows with batch x length, the others do not. Sequences hold 8 tokens of prompt, the rest is completion.",
    )
    show(
        "What does one optimiser step of the heal take?",
        rows,
        should,
        out,
        "heal",
        stored=stored(seed),
        n_threads=n_threads,
    )
    ways = by_way((0, 1), 1408, 32, 2, 16, 1, seed) if tiny else by_way((0, 2, 8), 32_768, 512, 8, 128, 5, seed)
    show(
        "What does each technique buy a step?",
        ways,
        ("as built is the fastest after every number of rounds, and does not slow down with them.",),
        out,
        "heal_by_way",
        n_threads=n_threads,
    )
    print("bytes stored for the backward pass, per token and output of a block's linear layers:", stored(seed))


def measure(lm: LM, name: str, batch: int, length: int, repeats: int, seed: int) -> dict:
    """Seconds and peak of one step with its AdamW update and its gradient pressure."""
    cfg = HealCfg(rank=8, layers=(0.2, 0.8), batch_size=batch, tau=0.0, lam=1.0, tokens_per_pass=1024)
    student, generator = Student(lm, cfg), torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, lm.head.weight.shape[0], (batch, length), generator=generator).tolist()
    samples = reference_samples(
        student,
        [Completion(i, "", tuple(row[:8]), tuple(row[8:]), "", 1.0, 1.0, i) for i, row in enumerate(tokens)],
        cfg,
    )
    student.new_round(seed)
    chunk_size = lm.chunk_size
    at_once = patch.object(
        LM, "chunk_size", chunk_size if name == "as built" else 2**62
    )  # of the others all completions take the head together
    try:
        with at_once, patch.object(loss, "position_terms", HEADS[name]), student.training() as parameters:
            optimiser, passes = torch.optim.AdamW(parameters, lr=1e-4, foreach=False), Passes(lm, cfg, parameters)

            def step() -> None:
                passes.gradients(samples, measure=True)
                optimiser.step()
                optimiser.zero_grad()

            over = peak_bytes(step, lm.device)
            seconds = min(_seconds(step) for _ in range(repeats))
            adapter = sum(p.nbytes for p in parameters)
    finally:
        student.discard_round()
    weights, chunk = (
        sum(p.nbytes for n, p in lm.model.named_parameters() if ".lora_" not in n),
        loss.CHUNK_BUFFERS * chunk_size * lm.head.weight.shape[0] * 4,
    )
    chunk = min(chunk, loss.CHUNK_BUFFERS * sum(len(s.completion_ids) for s in samples) * lm.head.weight.shape[0] * 4)
    peak, needed = weights + adapter + over, weights + 3 * adapter + chunk
    return {
        "head": name,
        "batch": batch,
        "length": length,
        "seconds": seconds,
        "tokens_per_s": batch * length / seconds,
        "weights_mib": weights / MIB,
        "adapter_mib": adapter / MIB,
        "chunk_mib": chunk / MIB,
        "peak_mib": peak / MIB,
        "ratio": peak / needed,
    }


def by_way(
    rounds: tuple[int, ...], vocabulary: int, width: int, n_layers: int, length: int, repeats: int, seed: int
) -> list[dict]:
    """Median seconds of a step after some rounds, as built and with one thing undone at a time, taken in turns."""
    lm, cfg, seconds = (
        _model(vocabulary, width, n_layers, seed),
        HealCfg(rank=32, layers=(0.2, 0.8), tau=0.0, lam=1.0),
        {},
    )
    student, generator = Student(lm, cfg), torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (4, length), generator=generator).tolist()
    given = [Completion(i, "", tuple(row[:8]), tuple(row[8:]), "", 1.0, 1.0, i) for i, row in enumerate(tokens)]
    ways = {
        "as built": (nullcontext(), cfg),
        "history apart": (patch.object(Student, "merging_is_lossy", True), cfg),
        "activations computed again": (nullcontext(), replace(cfg, checkpoint="on")),
        "chunks of 512 positions": (patch.object(LM, "chunk_size", 512), cfg),
    }
    for n in range(max(rounds) + 1):
        samples = reference_samples(student, given, cfg)
        student.new_round(n)
        for way, (undone, changed) in list(ways.items()) * (1 + repeats if n in rounds else 0):
            with undone, student.training() as parameters:
                passes = Passes(lm, changed, parameters)
                seconds.setdefault((way, n), []).append(_seconds(lambda: passes.gradients(samples, measure=False)))
        for _, b, _ in student.round_updates():
            b.data.copy_(0.003 * torch.randn(b.shape, generator=generator))
        student.bake()
    return [{"way": way, **{f"s_after_{n}_rounds": median(seconds[way, n][1:]) for n in rounds}} for way in ways]


def stored(seed: int) -> dict[str, float]:
    """What a Gemma 3 block under factors keeps for its backward pass, by dtype, alone and when it is computed again."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        lm = _model(1408, 256, 2, seed)
        lm.model.to(dtype)
        student = Student(lm, HealCfg(rank=8, layers=(0.0, 1.0)))
        outputs = sum(m.out_features for block in lm.blocks for m in block.modules() if isinstance(m, torch.nn.Linear))
        student.new_round(seed)
        with student.training():
            for name, blocks in (("stored", []), ("recomputed", lm.blocks)):
                seen: dict[int, int] = {}
                keep = lambda tensor: (
                    seen.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}) or tensor
                )
                with recomputed(blocks), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    hidden = lm.hidden([list(range(3, 259))])
                weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
                out[f"{name} {str(dtype).removeprefix('torch.')}"] = (
                    sum(n for at, n in seen.items() if at not in weights) / 256 / outputs
                )
                del hidden
    return out


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _model(vocabulary: int, width: int, n_layers: int, seed: int) -> LM:
    """A random Gemma 3 of that width, in the proportions of the 4b model."""
    torch.manual_seed(seed)
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
    return replace(load("tiny-random"), model=Gemma3ForCausalLM(config).eval().requires_grad_(False), name="random")


if __name__ == "__main__":
    sys.exit(cli(main))

"""The forward and backward passes of an optimiser step, sized to the memory there is.

The loss is a mean over completions, so a step may take any number of passes: the gradients add up to the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_heal.divergence import barrier
from steer_heal.lm import LM
from steer_heal.memory import ran_out
from steer_heal.records import UserError
from steer_heal.stages.cfg import HealCfg, layer_band
from steer_heal.stages.loss import Sample, losses

STORED_BYTES = 10
"""Bytes that a block keeps for its backward pass, per token and per output of its linear layers: activations, and the
float32 inputs of the factors. Measured: docs/benchmarks.md."""


class Passes:
    """Gradients of a step. `tokens` and `recompute` adapt where a pass runs out of memory, and stay so."""

    def __init__(self, lm: LM, cfg: HealCfg, parameters: Sequence[Tensor]) -> None:
        self.lm, self.cfg, self.parameters = lm, cfg, parameters
        self.tokens = cfg.tokens_per_pass
        self.blocks = list(lm.blocks)[layer_band(cfg.layers, len(lm.blocks)).start :]  # below, nothing is kept
        self.recompute = cfg.checkpoint == "on" or cfg.checkpoint == "auto" and self._stored() > max(2**28, _bytes(lm.model) / 5)

    def _stored(self) -> int:
        """Estimated bytes that one pass keeps for its backward pass without recomputing."""
        outputs = sum(m.out_features for block in self.blocks for m in block.modules() if isinstance(m, nn.Linear))
        return STORED_BYTES * self.tokens * outputs

    def gradients(self, batch: Sequence[Sample], measure: bool) -> tuple[float, float, float, float | None]:
        """Leaves the gradient of the loss in `.grad`; returns (sft, divergence, barrier, pressure or None).

        A pass that runs out of memory costs the step a new start with smaller passes, and nothing else.
        """
        warned = ""
        while True:
            try:
                found = self._add_up(batch, measure)
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                for parameter in self.parameters:
                    parameter.grad = None
            warned = self._shrink(batch)  # out here: the exception held on to the tensors of its pass
        if warned:
            warnings.warn(warned, stacklevel=2)
        return found

    def _shrink(self, batch: Sequence[Sample]) -> str:
        """Makes the passes smaller; what to tell about it."""
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()
        lengths = [len(sample.ids) for sample in batch]
        rows, largest = max((len(group), len(group) * max(lengths[i] for i in group)) for group in self.lm.batches(lengths, self.tokens))
        told = f"a pass of the heal over {rows} completions, {largest} tokens, ran out of memory"
        if rows > 1:
            self.tokens = largest // 2
            return f"{told}; passes of {self.tokens} tokens fit and are kept; --heal.tokens-per-pass {self.tokens} starts with them"
        if self.cfg.checkpoint == "auto" and not self.recompute:
            self.recompute = True
            return f"{told}; activations are computed again from here on; --heal.checkpoint on starts so"
        raise UserError(f"{told}, and cannot be smaller; use --heal.checkpoint on, a shorter --gen.max-new-tokens or a smaller --heal.rank")

    def _add_up(self, batch: Sequence[Sample], measure: bool) -> tuple[float, float, float, float | None]:
        cfg, parameters = self.cfg, self.parameters
        sums, pushed = torch.zeros(3, dtype=torch.float64), [torch.zeros_like(p) for p in parameters] if measure else []
        for group in self.lm.batches([len(sample.ids) for sample in batch], self.tokens):
            with recomputed(self.blocks) if self.recompute else nullcontext():
                sft, divergence = losses(self.lm, [batch[i] for i in group], cfg)
                penalty = barrier(divergence, cfg.lam, cfg.tau) if cfg.lam > 0 else torch.zeros_like(sft)
                if measure and penalty.detach().max() > 0:
                    for total, part in zip(pushed, torch.autograd.grad(penalty.sum() / len(batch), parameters, retain_graph=True, allow_unused=True)):
                        total += 0 if part is None else part
                ((sft + penalty).sum() / len(batch)).backward()
            sums += torch.stack([part.detach().double().sum().cpu() for part in (sft, divergence, penalty)])
        pulled = (p.grad - push for p, push in zip(parameters, pushed, strict=measure))
        pressure = _norm(pushed) / max(_norm(pulled), 1e-12) if measure else None
        return *(sums / len(batch)).tolist(), pressure


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a block keeps its input alone and runs forward again in the backward pass (Chen et al. 2016)."""
    blocks = list(blocks)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _norm(gradients: Iterable[Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())

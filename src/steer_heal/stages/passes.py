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

from steer_heal.errors import UserError
from steer_heal.model.divergence import barrier
from steer_heal.model.lm import LM
from steer_heal.model.memory import batches, free_bytes, free_unused, ran_out
from steer_heal.settings import HealCfg
from steer_heal.stages.loss import Sample, completion_states, losses

STORED_BYTES = 10
"""Bytes that a block keeps for its backward pass, per token and per output of its linear layers: activations, and the
float32 inputs of the factors. Measured: docs/benchmarks.md."""
STORED_SHARE = 0.5
"""Of the free memory that a pass may fill with them. The rest is for gradients, AdamW's state, a chunk of logits, and
another run beside this one."""


class Passes:
    """Gradients of a step. `tokens` and `recompute` adapt where a pass runs out of memory, and stay so."""

    def __init__(self, lm: LM, cfg: HealCfg, layers: tuple[float, float], parameters: Sequence[Tensor]) -> None:
        self.lm, self.cfg, self.parameters = lm, cfg, parameters
        self.tokens = cfg.tokens_per_pass
        self.blocks = list(lm.blocks)[lm.band("adapter.layers", layers).start :]  # below, nothing is kept
        self.recompute = cfg.checkpoint == "on" or (
            cfg.checkpoint == "auto" and self._stored() > STORED_SHARE * free_bytes(lm.device)
        )

    def _stored(self) -> int:
        """Estimated bytes that one pass keeps for its backward pass without recomputing.

        An adapted stack of experts is held whole, with the factors added. Activations inside of experts are left out.
        """
        linears = (
            m
            for block in self.blocks
            for name, m in block.named_modules()
            if isinstance(m, nn.Linear) and ".lora_" not in name
        )
        outputs = sum(m.out_features for m in linears)
        stacks = _bytes(p for block in self.blocks for p in block.parameters() if p.ndim == 3)
        return STORED_BYTES * self.tokens * outputs + stacks

    def gradients(self, batch: Sequence[Sample], measure: bool) -> tuple[float, float, float, float | None]:
        """(fit, divergence, barrier, pressure or None) of a step; the gradient of the loss is in `.grad`, empty before.

        After a pass that runs out of memory the step starts again with smaller passes.
        """
        warning = ""
        while True:
            try:
                found = self._add_up(batch, measure)
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                for parameter in self.parameters:
                    parameter.grad = None
            warning = self._shrink(batch)  # out here: the exception held on to the tensors of its pass
        if warning:
            warnings.warn(warning, stacklevel=2)
        return found

    def _shrink(self, batch: Sequence[Sample]) -> str:
        """Makes the passes smaller; returns a warning."""
        free_unused()
        lengths = [len(sample.ids) for sample in batch]
        groups = batches(lengths, self.tokens)
        largest, rows = max((len(group) * max(lengths[i] for i in group), len(group)) for group in groups)
        message = f"a pass of the heal over {rows} completions, {largest} tokens, ran out of memory"
        if rows > 1:
            self.tokens = largest // 2
            return (
                f"{message}; passes of {self.tokens} tokens fit; --heal.tokens-per-pass {self.tokens} starts with them"
            )
        if self.cfg.checkpoint == "auto" and not self.recompute:
            self.recompute = True
            return f"{message}; activations are computed again from here on; --heal.checkpoint on starts so"
        raise UserError(
            f"{message}, and cannot be smaller; use --heal.checkpoint on, a shorter --gen.max-new-tokens or a smaller "
            "--adapter.rank"
        )

    def _backward(self, rows: Sequence[Sample], n_samples: int, barrier_grads: Sequence[Tensor]) -> Tensor:
        """Sums of (fit, divergence, barrier) over the completions of one pass.

        Adds the gradient of its share of the loss to `.grad`, and that of its barrier to `barrier_grads` if given. The
        head runs for a few completions at a time, so that no logits wait for those of others.
        """
        cfg, states = self.cfg, completion_states(self.lm, rows)
        leaves = [state.detach().requires_grad_() for state in states]
        on_states: dict[int, Tensor] = {}
        sums = torch.zeros(3, dtype=torch.float64, device=self.lm.device)
        for part in head_groups([len(sample.completion_ids) for sample in rows], self.lm.chunk_size):
            mine = [leaves[i] for i in part]
            fit, divergence = losses(self.lm, [rows[i] for i in part], cfg, mine)
            penalty = barrier(divergence, cfg.lam, cfg.tau) if cfg.lam > 0 else torch.zeros_like(fit)
            if barrier_grads and penalty.detach().max() > 0:
                on_states |= zip(
                    part, torch.autograd.grad(penalty.sum() / n_samples, mine, retain_graph=True), strict=True
                )
            ((fit + penalty).sum() / n_samples).backward()
            sums += torch.stack([term.detach().double().sum() for term in (fit, divergence, penalty)])
            del fit, divergence, penalty  # their graph may hold on to logits
        if on_states:
            fired = [states[i] for i in on_states]
            for total, more in zip(
                barrier_grads,
                torch.autograd.grad(fired, self.parameters, list(on_states.values()), retain_graph=True),
                strict=True,
            ):
                total += more
        torch.autograd.backward(states, [leaf.grad for leaf in leaves])
        return sums.cpu()

    def _add_up(self, batch: Sequence[Sample], measure: bool) -> tuple[float, float, float, float | None]:
        sums = torch.zeros(3, dtype=torch.float64)
        barrier_grads = [torch.zeros_like(p) for p in self.parameters] if measure else []
        for group in batches([len(sample.ids) for sample in batch], self.tokens):
            with recomputed(self.blocks) if self.recompute else nullcontext():
                sums += self._backward([batch[i] for i in group], len(batch), barrier_grads)
        fit, divergence, penalty = (sums / len(batch)).tolist()
        if not measure:
            return fit, divergence, penalty, None
        pairs = zip((p.grad for p in self.parameters), barrier_grads, strict=True)
        fit_grads = (total - of_barrier for total, of_barrier in pairs if total is not None)
        return fit, divergence, penalty, _norm(barrier_grads) / max(_norm(fit_grads), 1e-12)


def head_groups(lengths: Sequence[int], chunk: int) -> Iterator[list[int]]:
    """Completions that go through the head together: as many as fit one chunk, which go back in one product; and all
    longer ones, which fill chunks between them and keep only vectors of width d."""
    part = [i for i, n in enumerate(lengths) if n > chunk]
    for i, n in enumerate(lengths):
        if n <= chunk:
            if part and sum(lengths[j] for j in part) + n > chunk:
                yield part
                part = []
            part.append(i)
    if part:
        yield part


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


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)

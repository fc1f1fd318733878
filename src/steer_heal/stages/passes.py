"""The forward and backward passes of an optimiser step, sized to the available memory.

The loss is a mean over examples, so a step can take any number of passes: their gradients add up to the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_heal.errors import UserError
from steer_heal.model.divergence import barrier
from steer_heal.model.lm import LM
from steer_heal.model.memory import batches, free_bytes, free_unused, ran_out
from steer_heal.settings import HealCfg
from steer_heal.stages.loss import Example, completion_states, losses, n_padded, n_positions

STORED_BYTES = 10
"""Bytes that a block keeps for its backward pass, per token and per output of its linear layers: activations, and the
float32 inputs of the factors. Measured in docs/benchmarks.md."""
STORED_SHARE = 0.5
"""Share of the free memory that a pass may fill with them. The rest is for gradients, AdamW's state, a chunk of logits,
and another run on the same device."""


class StepTerms(NamedTuple):
    """Means over the examples of a step, in nats."""

    fit: float
    divergence: float
    barrier: float
    pressure: float | None
    """||grad barrier|| / ||grad fit||. None: not measured in this step."""


class Passes:
    """Computes the gradients of a step. A pass that runs out of memory changes `tokens` or `recompute` for good."""

    def __init__(self, lm: LM, cfg: HealCfg, layers: tuple[float, float], parameters: Sequence[Tensor]) -> None:
        self.lm = lm
        self.cfg = cfg
        self.parameters = parameters
        self.underflows = lm.head.weight.dtype == torch.float16
        self.tokens = cfg.tokens_per_pass
        self.blocks = list(lm.blocks)[lm.band("adapter.layers", layers).start :]  # blocks below keep nothing
        self.recompute = cfg.checkpoint == "on" or (
            cfg.checkpoint == "auto" and self._stored() > STORED_SHARE * free_bytes(lm.device)
        )

    def _stored(self) -> int:
        """Estimated bytes that a forward pass keeps for its backward pass if nothing is recomputed.

        An adapted stack of experts is kept whole, with its factors added. Activations inside experts are not counted.
        """
        modules = (named for block in self.blocks for named in block.named_modules())
        outputs = sum(m.out_features for name, m in modules if isinstance(m, nn.Linear) and ".lora_" not in name)
        stacks = sum(p.nbytes for block in self.blocks for p in block.parameters() if p.ndim == 3)
        return STORED_BYTES * self.tokens * outputs + stacks

    def gradients(self, batch: Sequence[Example], with_pressure: bool) -> StepTerms:
        """Leaves the gradient of the loss of a step in `.grad`, which must be empty before; returns the step's terms.

        If a pass runs out of memory, the step starts again with smaller passes. UserError if they cannot be smaller.
        """
        warning = ""
        while True:
            try:
                terms = self._add_up(batch, with_pressure)
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                for parameter in self.parameters:
                    parameter.grad = None
            warning = self._shrink(batch)  # out here: the exception held on to the tensors of its pass
        if warning:
            warnings.warn(warning, stacklevel=2)
        return terms

    def _shrink(self, batch: Sequence[Example]) -> str:
        """Makes the passes smaller; returns a warning."""
        free_unused()
        lengths = [n_padded(example) for example in batch]
        groups = batches(lengths, self.tokens)
        n_tokens, n_examples = max((len(group) * max(lengths[i] for i in group), len(group)) for group in groups)
        message = f"a pass of the heal ran out of memory ({n_examples} training examples, {n_tokens} tokens)"
        if n_examples > 1:
            self.tokens = n_tokens // 2
            return f"{message}; trying {self.tokens} tokens per pass; start with --heal.tokens-per-pass {self.tokens}"
        if self.cfg.checkpoint == "auto" and not self.recompute:
            self.recompute = True
            return f"{message}; recomputing activations from now on; start with --heal.checkpoint on"
        raise UserError(
            f"{message}, and it cannot be split; use --heal.checkpoint on, a shorter --gen.max-new-tokens or a smaller "
            "--adapter.rank"
        )

    def _add_up(self, batch: Sequence[Example], with_pressure: bool) -> StepTerms:
        sums = torch.zeros(3, dtype=torch.float64)
        barrier_grads = [torch.zeros_like(p) for p in self.parameters] if with_pressure else []
        # The mean over positions makes each gradient as small as their number is large, and float16 ends at 6e-8.
        scale = float(sum(map(n_positions, batch))) if self.underflows else 1.0
        for group in batches([n_padded(example) for example in batch], self.tokens):
            with recomputed(self.blocks) if self.recompute else nullcontext():
                sums += self._backward([batch[i] for i in group], scale / len(batch), barrier_grads)
        if scale != 1:
            for grad in (*barrier_grads, *(p.grad for p in self.parameters if p.grad is not None)):
                grad /= scale
        fit, divergence, penalty = (sums / len(batch)).tolist()
        pressure = None
        if with_pressure:
            both = zip((p.grad for p in self.parameters), barrier_grads, strict=True)
            fit_grads = (total - of_barrier for total, of_barrier in both if total is not None)
            pressure = _norm(barrier_grads) / max(_norm(fit_grads), 1e-12)
        return StepTerms(fit, divergence, penalty, pressure)

    def _backward(self, examples: Sequence[Example], weight: float, barrier_grads: Sequence[Tensor]) -> Tensor:
        """Sums of (fit, divergence, barrier) over the examples of one pass.

        Adds the gradient of the sum of their losses times `weight` to `.grad`, and that of the barrier's part to
        `barrier_grads`, unless that is empty. The head runs for a few examples at a time: their logits are gone before
        the next ones are computed.
        """
        cfg = self.cfg
        states = completion_states(self.lm, examples)
        leaves = [state.detach().requires_grad_() for state in states]
        on_states: dict[int, Tensor] = {}
        sums = torch.zeros(3, dtype=torch.float64, device=self.lm.device)
        for group in head_groups([n_positions(example) for example in examples], self.lm.chunk_size):
            mine = [leaves[i] for i in group]
            fit, divergence = losses(self.lm, [examples[i] for i in group], cfg, mine)
            penalty = barrier(divergence, cfg.lam, cfg.tau) if cfg.lam > 0 else torch.zeros_like(fit)
            if barrier_grads and penalty.detach().max() > 0:
                grads = torch.autograd.grad(weight * penalty.sum(), mine, retain_graph=True)
                on_states |= zip(group, grads, strict=True)
            (weight * (fit + penalty).sum()).backward()
            sums += torch.stack([term.detach().double().sum() for term in (fit, divergence, penalty)])
            del fit, divergence, penalty  # their graph may hold on to logits
        if on_states:
            fired = [states[i] for i in on_states]
            grads = torch.autograd.grad(fired, self.parameters, list(on_states.values()), retain_graph=True)
            for total, grad in zip(barrier_grads, grads, strict=True):
                total += grad
        torch.autograd.backward(states, [leaf.grad for leaf in leaves])
        return sums.cpu()


def head_groups(lengths: Sequence[int], chunk: int) -> Iterator[list[int]]:
    """Examples that go through the head together, by index. Those of at most `chunk` positions are grouped so that each
    group fits one chunk. All longer ones form one group, which is cut into chunks."""
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
    """While inside, each block keeps only its input, and recomputes its activations in the backward pass (Chen et al.
    2016)."""
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

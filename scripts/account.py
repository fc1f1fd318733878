"""Where the seconds of a piece of work go: its operators are counted, and timed again alone on operands of the same shapes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

COLD_BYTES = 2**27
"""Operands are taken in turn from so many bytes of copies: the weights that a forward pass reads come from memory, not from a cache."""
aten = torch.ops.aten
NO_DATA = {aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
"""Operators that neither read nor write numbers, beside the views."""
PICKS = {aten.embedding, aten.gather, aten.index, aten.index_select}
"""Operators that read no more of their operand than they return."""
FLOP: dict[Any, Callable[..., int]] = {
    **{packet: flop_registry[packet] for packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)},
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
"""Products, attention among them: how many floating-point operations their arguments ask for."""


@dataclass(frozen=True)
class Like:
    """A tensor's shape, strides and type, of which another one can be made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def make(self) -> Tensor:
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride)) if self.shape.numel() else 0
        new = torch.zeros(extent, dtype=self.dtype)  # as an index, 0 is valid everywhere
        if self.dtype.is_floating_point:
            new.normal_(generator=torch.Generator().manual_seed(0))
        return new.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """An operator with all that decides how long it takes on the CPU; of each tensor what it is like."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Tally(TorchDispatchMode):
    """While inside, counts every operator that touches numbers, forward and backward, with its bytes read and written and,
    of products, its floating-point operations (FLOP)."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls: Counter[Call] = Counter()
        self.n_bytes: dict[Call, int] = {}
        self.flop: dict[Call, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket in NO_DATA:
            return out
        call = Call(func, _each_tensor(args, _like), _each_tensor(tuple((kwargs or {}).items()), _like))
        self.n_calls[call] += 1
        if call not in self.n_bytes:
            seen: list[Like] = []
            _each_tensor(
                (out, out) if func.overloadpacket in PICKS else (args, out), lambda tensor: seen.append(_like(tensor))
            )
            self.n_bytes[call] = sum(like.n_bytes for like in seen)
            if func.overloadpacket in FLOP:
                self.flop[call] = FLOP[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def account(self, seconds: float, best: Mapping[str, float]) -> dict[str, float]:
        """What `seconds` of this work went to: products, other operators, and what lies between operators (Python, dispatch).

        at_best_s: each product at the rate `best["gflop_per_s"]` or, where that takes longer, its bytes at `best["gb_per_s"]`,
        as all other operators' bytes.
        """
        alone = {call: n * self._seconds(call) for call, n in self.n_calls.items()}
        gb, gflop = (
            {call: n * each[call] / 1e9 for call, n in self.n_calls.items() if call in each}
            for each in (self.n_bytes, self.flop)
        )
        products_s, all_s = sum(alone[call] for call in gflop), sum(alone.values())
        return {
            "seconds": seconds,
            "products_s": products_s,
            "others_s": all_s - products_s,
            "between_s": seconds - all_s,
            "n_calls": self.n_calls.total(),
            "gflop": sum(gflop.values()),
            "other_gb": sum(n for call, n in gb.items() if call not in gflop),
            "at_best_s": sum(
                max(n / best["gb_per_s"], gflop.get(call, 0.0) / best["gflop_per_s"]) for call, n in gb.items()
            ),
        }

    def _seconds(self, call: Call) -> float:
        """One such call alone."""
        make = lambda: _each_tensor((call.args, call.kwargs), Like.make, Like)
        operands = [
            make() for _ in range(max(3, min(self.n_calls[call], COLD_BYTES // max(1, self.n_bytes[call]), 64)))
        ]
        return median_s(
            *(lambda args=args, kwargs=kwargs: call.operator(*args, **dict(kwargs)) for args, kwargs in operands)
        )


def _like(tensor: Tensor) -> Like:
    return Like(tensor.shape, tensor.stride(), tensor.dtype)


def _each_tensor(value: Any, turn: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """`value` with whatever is of that kind turned into something else, lists as tuples."""
    if isinstance(value, kind):
        return turn(value)
    return (
        tuple(_each_tensor(each, turn, kind) for each in value)
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
        else value
    )


def rates() -> dict[str, float]:
    """This processor at its best, on as many threads as torch has: products, reading plus writing memory, and writing such as
    the system has only just handed out; and products of some rows with weights of 1024 x 1024 that come from memory."""
    long, weights = torch.ones(2**26), torch.ones(64, 1024, 1024)
    products = {n: median_s(*(lambda w=w, x=torch.ones(n, 1024): x @ w.T for w in weights)) for n in (1, 32, 128, 1024)}
    rows = {f"gflop_per_s_of_{n}_rows": 2 * n * 1024**2 / seconds / 1e9 for n, seconds in products.items()}
    return rows | {
        "gflop_per_s": max(rows.values()),
        "gb_per_s": 2 * long.nbytes / median_s(*[lambda: long.mul_(1.0)] * 7) / 1e9,
        "fresh_gb_per_s": long.nbytes / median_s(*[lambda: torch.ones(2**26)] * 7) / 1e9,
    }


def median_s(first: Callable[[], object], *others: Callable[[], object]) -> float:
    """Median seconds of some pieces of work that are alike, once the first of them has been done to warm up."""
    first()
    seconds = []
    for work in (first, *others):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return median(seconds)

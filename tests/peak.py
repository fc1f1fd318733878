"""The most bytes that tensors held at one time. It sees what operators return, not what they allocate inside."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(work: Callable[[], object]) -> int:
    """Of the tensors that `work` made, while it ran."""
    with _Peak() as used:
        work()
    return used.peak


class _Peak(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.update(_storages((args, kwargs)))  # those from before do not count, nor do views of them
        out = func(*args, **(kwargs or {}))
        for storage in [storage for storage in _storages(out) if storage not in self.seen]:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, n_bytes: int) -> None:
        self.now -= n_bytes


def _storages(values: object) -> set[torch.UntypedStorage]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return {leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)}

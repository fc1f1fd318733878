"""How much memory a piece of work needs, as the allocator saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that lived at once while `work` ran, over those that lived before it.

    On the CPU from the profiler's record of every allocation and release, which also holds what operators allocate
    inside; on a GPU from the caching allocator's own count. The resident size of the process would count what
    the C library has not given back yet.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(0, *accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@contextmanager
def resident_peak() -> Iterator[list[int]]:
    """Puts the highest resident bytes of the process while inside into the list; nothing where Linux does not tell.

    Costs no time, unlike `peak_bytes`, and counts everything, also what was resident before.
    """
    found: list[int] = []
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield found
        return
    yield found
    status = Path("/proc/self/status").read_text()
    found.append(int(status.split("VmHWM:")[1].split()[0]) * 1024)

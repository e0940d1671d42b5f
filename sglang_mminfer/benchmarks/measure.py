"""How the benchmarks measure: time on the device and on the host, and what a plan holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan, PrefillPlan

METHOD = (
    "CUDA events around one call, median of the repeats; one call before is not counted; caches are left warm "
    "(nothing is flushed between repeats). A call of more than 5 s is timed once, cold."
)
LONG_MS = 5000.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, least and most of `repeats` calls."""

    ms: float
    least: float
    most: float
    repeats: int


def timed(work: Callable[[], object], device: str, budget_ms: float = 300.0) -> Timing:
    """Time of one call of `work`, repeated for about `budget_ms` milliseconds, at most 30 times; see METHOD."""
    times = [_once(work, device)]
    if times[0] < LONG_MS:
        times = [_once(work, device)]
        fewest = 3 if times[0] < LONG_MS / 5 else 1
        repeats = int(min(30, max(fewest, budget_ms // max(times[0], 1e-3))))
        times += [_once(work, device) for _ in range(repeats - 1)]
    return Timing(median(times), min(times), max(times), len(times))


def _once(work: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@dataclass(frozen=True)
class PlanCost:
    """Milliseconds to make a plan: until the host is free again, until the device is done, and the sum of what
    the device spent in kernels and copies (None where it cannot be told)."""

    host_ms: float
    wall_ms: float
    device_ms: float | None


def plan_cost(make: Callable[[], object], device: str, repeats: int = 3) -> PlanCost:
    """Cost of `make`, after a call that is not counted."""
    make()
    host, wall = [], []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        make()
        host.append((time.perf_counter() - start) * 1e3)
        wait(device)
        wall.append((time.perf_counter() - start) * 1e3)
    return PlanCost(median(host), median(wall), None if device == "cpu" else _busy_ms(make))


def _busy_ms(work: Callable[[], object]) -> float | None:
    """Milliseconds that the device spends in kernels and copies of one call, gaps left out."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            work()
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in trace.key_averages()) / 1e3
    except (RuntimeError, AssertionError):  # no tracing in this container, for one
        return None


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def visited_pairs(plan: PrefillPlan) -> float:
    """(row, key) pairs of visited tiles, the mean over heads; those above the diagonal included: what is computed."""
    pairs = 0.0
    for block_plan in plan.passes:
        rows, blocks = block_plan.q_indptr.diff().double(), block_plan.block_indptr.diff().double()
        shares = torch.tensor([len(heads) for heads in block_plan.head_groups], device=rows.device)
        pairs += float((rows * blocks * shares[block_plan.q_heads.long()]).sum()) * block_plan.block_k / plan.num_heads
    return pairs


def causal_pairs(rows: int, tokens: int) -> int:
    """(row, key) pairs at or below the diagonal, for the last `rows` of `tokens`."""
    return rows * (2 * tokens - rows + 1) // 2


def index_bytes(plan: PrefillPlan) -> int:
    """Of all that the kernel is given beside q, k and v. Call it after a run: some of it is made on first use."""
    held = [x for own in plan.passes for holder in (own, own.keys) for x in vars(holder).values()]
    held += [x for several in held if isinstance(several, tuple) for x in several]
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in held if isinstance(x, torch.Tensor)}
    return sum(store.nbytes() for store in stores.values())


def visits(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [visits] three times: the query tile, the key tile, and 0 for full, 1 for partial, 2 for picked."""
    tile, number = plan.visits()
    visited = plan.block_indptr.diff()
    kind = (number >= plan.num_full[tile]).long() + (number >= (visited - plan.num_picked)[tile]).long()
    return tile, plan.visited_blocks(tile, number), kind


def describe_card() -> dict[str, Any]:
    """The GPU and what drives it, for a result file; empty without one."""
    if not torch.cuda.is_available():
        return {}
    card = torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }

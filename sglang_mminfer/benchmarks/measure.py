"""How the benchmarks measure: time on the device and on the host, and what a plan holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan

METHOD = (
    "CUDA events around one call, median of the repeats; one call before is not counted; caches are left warm "
    "(nothing is flushed between repeats). A call of more than 5 s is timed once, cold."
)
LONG_MS = 5000.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, minimum and maximum of `repeats` calls."""

    ms: float
    least: float
    most: float
    repeats: int


def timed(work: Callable[[], object], device: str, budget_ms: float = 300.0) -> Timing:
    """Time one call of `work`, repeated for about `budget_ms` milliseconds, at most 30 times. See METHOD."""
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
    """What making a plan costs, in milliseconds.

    host_ms:   until the host is free again.
    wall_ms:   until the device is done.
    device_ms: the time that the device spends in kernels and copies; None if it cannot be traced.
    """

    host_ms: float
    wall_ms: float
    device_ms: float | None


def plan_cost(make: Callable[[], object], device: str, repeats: int = 3) -> PlanCost:
    """The cost of `make`, the median of `repeats` calls; one call before them is not counted."""
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
    """Milliseconds that the device spends in kernels and copies of one call, without the gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            work()
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in trace.key_averages()) / 1e3
    except (RuntimeError, AssertionError):  # a container may not permit tracing
        return None


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def visited_pairs(plan: BlockPlan) -> float:
    """(row, key) pairs that the kernel computes, those above the diagonal included; the mean over heads."""
    rows, blocks = plan.q_indptr.diff().double(), plan.block_indptr.diff().double()
    shares = torch.tensor([len(heads) for heads in plan.head_groups], device=rows.device)
    return float((rows * blocks * shares[plan.q_heads.long()]).sum()) * plan.block_k / plan.num_heads


def causal_pairs(rows: int, tokens: int) -> int:
    """(row, key) pairs at or below the diagonal, for the last `rows` rows of a prompt of `tokens` tokens."""
    return rows * (2 * tokens - rows + 1) // 2


def index_bytes(plan: BlockPlan) -> int:
    """Bytes of all that the kernel reads beside q, k and v. Call it after a run: some arrays are made on first use."""
    values = [x for holder in (plan, plan.keys, *plan.derived.values()) for x in vars(holder).values()]
    values += [x for value in values if isinstance(value, tuple) for x in value]
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in values if isinstance(x, torch.Tensor)}
    return sum(store.nbytes() for store in stores.values())


def visits(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [visits] three times: the query tile, the key tile, and the kind: 0 full, 1 partial, 2 gathered."""
    tile, number = plan.visits()
    visited = plan.block_indptr.diff()
    kind = (number >= plan.num_full[tile]).long() + (number >= (visited - plan.num_gathered)[tile]).long()
    return tile, plan.visited_blocks(tile, number), kind


def describe_card() -> dict[str, Any]:
    """The GPU, CUDA and cuDNN, for a result file; empty without a GPU."""
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

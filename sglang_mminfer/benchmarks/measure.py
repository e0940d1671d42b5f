"""How the benchmarks measure: time on the device and on the host, and what a plan holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from statistics import median
from typing import Any

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.work_items import NUM_PAIRS, PROCESSORS, WorkItems

METHOD = (
    "CUDA events around one call, median of the repeats; one call before is not counted; caches are left warm "
    "(nothing is flushed between repeats). The device is kept busy until the host has issued the call, so that no "
    "launch is waited for. A call of more than 5 s is timed once, cold."
)
LONG_MS = 5000.0
CYCLES_OF_A_MS = 2_000_000  # of a device's clock, at least
LEAST_BUSY_MS, MOST_BUSY_MS = 1.0, 200.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, minimum and maximum of `repeats` calls; and what issuing one takes the host."""

    ms: float
    least: float
    most: float
    repeats: int
    issue_ms: float


def timed(work: Callable[[], object], device: str, budget_ms: float = 300.0) -> Timing:
    """Time one call of `work`, repeated for about `budget_ms` milliseconds, at most 30 times. See METHOD."""
    calls = [_once(work, device, 0.0)]
    if calls[0][0] < LONG_MS:
        busy_ms = 0.0
        if device == "cuda":
            _, issue_ms = _once(work, device, MOST_BUSY_MS)  # the first call compiled
            busy_ms = min(MOST_BUSY_MS, max(LEAST_BUSY_MS, 2 * issue_ms))
        calls = [_once(work, device, busy_ms)]
        fewest = 3 if calls[0][0] < LONG_MS / 5 else 1
        repeats = int(min(30, max(fewest, budget_ms // max(calls[0][0], 1e-3))))
        calls += [_once(work, device, busy_ms) for _ in range(repeats - 1)]
    times, issued = zip(*calls)
    return Timing(median(times), min(times), max(times), len(times), median(issued))


def _once(work: Callable[[], object], device: str, busy_ms: float) -> tuple[float, float]:
    """Milliseconds of one call, and of the host until it has issued it. The device does nothing useful for `busy_ms`
    milliseconds before."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        ms = (time.perf_counter() - start) * 1e3
        return ms, ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(busy_ms * CYCLES_OF_A_MS))
    start = time.perf_counter()
    begin.record()
    work()
    end.record()
    issue_ms = (time.perf_counter() - start) * 1e3
    end.synchronize()
    return begin.elapsed_time(end), issue_ms


@dataclass(frozen=True)
class Cost:
    """What some work costs, in milliseconds: until the host is free again, and until the device is done."""

    host_ms: float
    wall_ms: float


def cost(work: Callable[[], object], device: str, repeats: int = 3) -> Cost:
    """The median of `repeats` calls of work that has run before. The device is idle when a call begins."""
    host, wall = [], []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        host.append((time.perf_counter() - start) * 1e3)
        wait(device)
        wall.append((time.perf_counter() - start) * 1e3)
    return Cost(median(host), median(wall))


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
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in _tensors(plan, set())}
    return sum(store.nbytes() for store in stores.values())


def _tensors(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors that a value holds, in dataclasses, dictionaries, tuples and lists."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)) or is_dataclass(value):
        fields = vars(value) if is_dataclass(value) else value
        for part in fields.values() if isinstance(fields, dict) else fields:
            yield from _tensors(part, seen)


def visits(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [visits] three times: the query tile, the key tile, and the kind: 0 full, 1 partial, 2 gathered."""
    tile, number = plan.visits()
    visited = plan.block_indptr.diff()
    kind = (number >= plan.num_full[tile]).long() + (number >= (visited - plan.num_gathered)[tile]).long()
    return tile, plan.visited_blocks(tile, number), kind


@dataclass(frozen=True)
class Use:
    """How well the work items of a plan use a card.

    items:          how many there are.
    rows_used:      rows of matrix products that hold a (row, head), of all that are multiplied.
    longest_visits: key tiles of the longest item.
    longest_share:  the same, of what a multiprocessor has to do if all have equally much.
    scratch_mb:     what items write for others to join, in fp32.
    """

    items: int
    rows_used: float
    longest_visits: int
    longest_share: float
    scratch_mb: float


def use(items: WorkItems, head_dim: int) -> Use:
    pairs, visits = items.table[:, NUM_PAIRS], items.visits
    total, longest = int(visits.sum()), int(visits.max(initial=0))
    return Use(
        items=items.num_items,
        rows_used=float(pairs @ visits) / max(1, items.pairs * total),
        longest_visits=longest,
        longest_share=longest * PROCESSORS / max(1, total),
        scratch_mb=items.num_slots * items.pairs * (head_dim + 1) * 4 / 1e6,
    )


def describe_card() -> dict[str, Any]:
    """The GPU, CUDA, cuDNN and the assembler, for a result file; empty without a GPU."""
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
        "ptxas": _ptxas(card.major),
    }


def _ptxas(major: int) -> str:
    """The version of the assembler that Triton calls."""
    from triton import knobs

    return (knobs.nvidia.ptxas_blackwell if major >= 10 else knobs.nvidia.ptxas).version

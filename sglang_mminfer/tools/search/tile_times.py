"""What a visit of a tile takes, by kind: the executor is timed on made-up plans, on the machine that is searched on.

A visit is one query tile and one key tile of one head. What planning takes, and an estimate's index work, is not in it.
Times are noisy and decide what is chosen, so they are measured once, in every layer, rounded, and kept in a file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable, PrefillPlan, pack_lanes
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.planning.planner import BLOCK_K, BLOCK_Q
from sglang_mminfer.planning.tiles import FULL, PARTIAL, PICKED

FILE = "tile_times.json"
KINDS = ("full", "partial", "picked")  # number FULL, PARTIAL, PICKED
HEADS = 4
TILES, TILES_ON_GPU = 2, 64  # query tiles of each head: enough work for all that run at a time
FEW, MANY = 8, 32  # visits of a query tile: their difference is free of what a tile takes by itself
ROUNDS = 3


class TileTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds of one visit, and of which executor."""

    full: float
    partial: float
    picked: float
    executor: str

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not 0 < getattr(self, kind) < 1e9:
                raise ValueError(f"{kind}: expected microseconds above 0, got {getattr(self, kind)}")

    @property
    def by_kind(self) -> np.ndarray:
        return np.array([self.full, self.partial, self.picked])

    def __str__(self) -> str:
        return f"full {self.full:g}, partial {self.partial:g}, picked {self.picked:g} µs ({self.executor})"


def measured(execute: Executor, dim: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Microseconds of a visit of each kind, for heads of `dim` that share K and V, each with tiles of its own.

    All cases take turns, and the quickest turn of each counts: whatever else the machine does only ever adds.
    """
    draw = torch.Generator().manual_seed(0)
    tiles = TILES_ON_GPU if device.type == "cuda" else TILES
    q = torch.randn(tiles * BLOCK_Q, HEADS, dim, generator=draw).to(device, dtype)
    k, v = torch.randn(2, 2 * MANY * BLOCK_K, 1, dim, generator=draw).to(device, dtype)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=device)
    plans = {(kind, n): made_up_plan(kind, n, tiles, device) for kind in range(len(KINDS)) for n in (FEW, MANY)}
    best = dict.fromkeys(plans, float("inf"))
    for turn in range(ROUNDS + 1):
        for case, plan in plans.items():
            _wait(q)
            start = time.perf_counter()
            execute(q, k, v, plan, dim**-0.5, out, lse)
            _wait(q)
            if turn:  # the first compiles, and makes what a plan keeps
                best[case] = min(best[case], time.perf_counter() - start)
    visits = HEADS * tiles * 1e-6
    found = []
    for kind in range(len(KINDS)):
        few, many = best[kind, FEW], best[kind, MANY]
        found.append((many - few) / (MANY - FEW) / visits if many > few else many / MANY / visits)
    return found


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def made_up_plan(kind: int, visits: int, tiles: int, device: torch.device) -> PrefillPlan:
    """Every head by itself: `tiles` query tiles, each with so many visits of one kind.

    They are of every other key tile, so that none lie side by side. The rows of a partial tile are cut one after the
    other, the last sees all; of a picked one every eighth lane does not count.
    """
    every, keys = HEADS * tiles, torch.arange(2 * MANY * BLOCK_K, dtype=torch.int32)
    cut = torch.linspace(BLOCK_K, 2 * visits * BLOCK_K, BLOCK_Q).int()
    stop = cut if kind == PARTIAL else torch.full_like(cut, len(keys))
    hidden = (torch.arange(BLOCK_K) % 8 == 0).expand(every * visits if kind == PICKED else 0, -1)

    def each(number: int) -> torch.Tensor:
        return torch.full((every,), number, dtype=torch.int32, device=device)

    block_plan = BlockPlan(
        keys=KeyTable(keys.to(device), keys.to(device)),
        q_rows=torch.arange(tiles * BLOCK_Q, dtype=torch.int32).repeat(HEADS).to(device),
        q_stop=stop.repeat(every).to(device),
        q_indptr=(torch.arange(every + 1, dtype=torch.int32) * BLOCK_Q).to(device),
        q_heads=torch.arange(HEADS, dtype=torch.int32).repeat_interleave(tiles).to(device),
        block_indptr=(torch.arange(every + 1, dtype=torch.int32) * visits).to(device),
        block_indices=(2 * torch.arange(visits, dtype=torch.int32)).repeat(every).to(device),
        num_full=each(visits if kind == FULL else 0),
        num_picked=each(visits if kind == PICKED else 0),
        hidden_lanes=pack_lanes(hidden).to(device),
        head_groups=tuple((head,) for head in range(HEADS)),
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
        num_work=every,
    )
    return PrefillPlan((block_plan,), tiles * BLOCK_Q, HEADS)


def agreed(measurements: Sequence[Sequence[float]], executor: str) -> TileTimes:
    """The median of many measurements, to two digits: what is beyond them is noise.

    Of the ratios to a full tile's time, that is: a busy machine stretches all kinds of one measurement alike.
    """
    full = median(own[FULL] for own in measurements)
    middle = [full * median(own[kind] / own[FULL] for own in measurements) for kind in range(len(KINDS))]
    rounded = {kind: float(f"{us:.2g}") for kind, us in zip(KINDS, middle)}
    return TileTimes(**rounded, executor=executor)


def load(path: Path) -> TileTimes:
    """Raises ValueError, naming the file, where it does not hold such times; OSError where there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=TileTimes)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: expected times of tile visits: {error}") from None

"""Measures the time of a tile visit, by kind: the executor runs made-up plans on the machine of the search.

A visit is one query tile and one key tile of one head. The time of planning and of an estimate's index work is not
included. Times are noisy, and the search's choices depend on them, so they are measured once, in every layer, rounded,
and kept in a file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable, pack_lanes
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.planning.row_loops import FULL, GATHERED, PARTIAL
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q

FILE = "tile_times.json"
KINDS = ("full", "partial", "picked")  # in the order FULL, PARTIAL, GATHERED; the names in tile_times.json
HEADS = 4
TILES, TILES_ON_GPU = 2, 64  # query tiles of each head: enough to keep all processors busy
FEW, MANY = 8, 32  # visits of a query tile: the difference of two times is free of a query tile's fixed cost
ROUNDS = 3


class TileTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds of one visit of each kind, and the executor that was timed."""

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
        return f"full {self.full:g}, partial {self.partial:g}, gathered {self.picked:g} µs ({self.executor})"


def measured(execute: Executor, dim: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Microseconds of a visit of each kind, for heads of `dim` that share a KV head and have tiles of their own.

    All cases take turns, and the fastest turn of each case counts, because other load only adds time.
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
            if turn:  # turn 0 compiles, and makes what is kept with a plan
                best[case] = min(best[case], time.perf_counter() - start)
    visits = HEADS * tiles * 1e-6
    microseconds = []
    for kind in range(len(KINDS)):
        few, many = best[kind, FEW], best[kind, MANY]
        microseconds.append((many - few) / (MANY - FEW) / visits if many > few else many / MANY / visits)
    return microseconds


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def made_up_plan(kind: int, visits: int, tiles: int, device: torch.device) -> BlockPlan:
    """A plan of `tiles` query tiles for every head, each with `visits` visits of one kind.

    A query tile visits every other key tile, so that no two lie side by side. In partial tiles the rows' bounds are
    spread over all keys, and the last row sees all keys; in gathered tiles every eighth lane is excluded.
    """
    query_tiles, keys = HEADS * tiles, torch.arange(2 * MANY * BLOCK_K, dtype=torch.int32)
    frontiers = torch.linspace(BLOCK_K, 2 * visits * BLOCK_K, BLOCK_Q).int()
    stop = frontiers if kind == PARTIAL else torch.full_like(frontiers, len(keys))
    excluded = (torch.arange(BLOCK_K) % 8 == 0).expand(query_tiles * visits if kind == GATHERED else 0, -1)

    def filled(number: int) -> torch.Tensor:
        return torch.full((query_tiles,), number, dtype=torch.int32, device=device)

    return BlockPlan(
        keys=KeyTable(keys.to(device), keys.to(device)),
        q_rows=torch.arange(tiles * BLOCK_Q, dtype=torch.int32).repeat(HEADS).to(device),
        q_stop=stop.repeat(query_tiles).to(device),
        q_indptr=(torch.arange(query_tiles + 1, dtype=torch.int32) * BLOCK_Q).to(device),
        q_heads=torch.arange(HEADS, dtype=torch.int32).repeat_interleave(tiles).to(device),
        block_indptr=(torch.arange(query_tiles + 1, dtype=torch.int32) * visits).to(device),
        block_indices=(2 * torch.arange(visits, dtype=torch.int32)).repeat(query_tiles).to(device),
        num_full=filled(visits if kind == FULL else 0),
        num_gathered=filled(visits if kind == GATHERED else 0),
        excluded_lanes=pack_lanes(excluded).to(device),
        head_groups=tuple((head,) for head in range(HEADS)),
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
        num_rows=tiles * BLOCK_Q,
        num_heads=HEADS,
    )


def agreed(measurements: Sequence[Sequence[float]], executor: str) -> TileTimes:
    """The medians of many measurements, rounded to two digits, because further digits are noise.

    The medians are taken of the ratios to a full tile's time, because a busy machine stretches all times of one
    measurement alike.
    """
    full = median(times[FULL] for times in measurements)
    medians = [full * median(times[kind] / times[FULL] for times in measurements) for kind in range(len(KINDS))]
    rounded = {kind: float(f"{us:.2g}") for kind, us in zip(KINDS, medians)}
    return TileTimes(**rounded, executor=executor)


def load(path: Path) -> TileTimes:
    """The times in a file.

    Raises:
        ValueError: the file holds something else; the message names it.
        OSError: the file cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=TileTimes)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: expected times of tile visits: {error}") from None

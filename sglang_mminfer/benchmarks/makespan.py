"""How long attention of a layer should take on a GPU: a model, from real plans, before work items and with them.

    python -m sglang_mminfer.benchmarks.makespan [--out FILE]

No clock is read and no GPU is needed. A program takes as long as its key tiles at a rate that is assumed for the
kernel, and a little more. Programs are taken up in their order, each by the multiprocessor that is free
first (list scheduling). What is copied before the programs run and joined after them takes as long as its bytes. The
engines:

* before: a program for each (query tile, head), always 128 rows wide however few the tile has; a launch for each pass,
  one after the other. So was this engine before it had work items.
* triton: the work items of `kernels/work_items.py` in one launch; parts of lists are joined from a scratch.
* fa4_gathered: the same on FlashAttention-4, with key tiles of 128 keys. Queries, and each visited key once for all
  orders of tokens, are copied to where the kernel reads them in a row; every item writes to a scratch.
* fa4_paged: the same, but the kernel reads keys from the cache through its page table.

`dense` is what the best dense kernel would take, and `ideal` is dense times density.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.benchmarks import measure
from sglang_mminfer.benchmarks.cases import (
    CHUNK,
    GRID_STATIC,
    HEAD_DIM,
    ROW,
    SEARCHED,
    SHAPES,
    TARGET,
    Case,
    K,
    conversation,
    layers,
)
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.work_items import FIRST_HEAD, NUM_PAIRS, PROCESSORS, work_items
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.tools import machine

# ---- assumptions ---------------------------------------------------------------------------------------------

DENSE = 650.0
"""TFLOP/s of dense attention in bf16, causal, head dim 128, long prompts: FlashAttention-3 and cuDNN are published with
620 to 650 on an H100. The larger figure is taken, in dense's favour."""

RATES = {"before": 450.0, "triton": 450.0, "fa4_gathered": 600.0, "fa4_paged": 570.0}
"""TFLOP/s of the whole card while all programs multiply full tiles.

Triton: kernels of this shape are published with 438 to 469 on an H100, and the instructions of ours, as compiled,
agree with that. FlashAttention-4: published with 570 to 620 on an H100. Paged: 5 % less, which is what FlashInfer's
author gives for loads through a page table against the tensor memory accelerator."""

PROGRAM_US = 3.0
"""What a program takes beside its key tiles: it starts, fills its pipeline and writes its result. A guess."""

BANDWIDTH = 4.0
"""TB/s of memory that copies and joins reach: an H200's, whose data sheet says 4.8."""

ROWS = 128
"""Rows of the matrix products of a program."""

ELEMENT, SUM = 2, 4
"""Bytes of a value in bf16, and in a scratch in fp32."""

# ---- what is modelled ----------------------------------------------------------------------------------------

LENGTHS = (32 * K, TARGET, 256 * K, 1024 * K)
PATTERNS = (GRID_STATIC, "grid frame", ROW, "a_shape", "q-boundary", "2d-boundary", SEARCHED)
LAYERS = 2
"""How many layers of a searched config are modelled; the figures are their means."""

Figures = dict[str, float]


def cases() -> Iterator[Case]:
    for shape, tokens, pattern in product(("28/4", "32/8"), LENGTHS, PATTERNS):
        yield Case(shape, tokens, CHUNK, pattern)
    for shape, tokens, rows in product(("28/4", "32/8"), LENGTHS, (2048, 2 * CHUNK)):
        yield Case(shape, tokens, rows, GRID_STATIC)


def modelled(case: Case) -> dict[str, Figures]:
    """What one case takes.

    Returns:
        "layer": "density", "dense_ms" and "ideal_ms"; and under the name of each engine:
        ms:                     of the layer: programs_ms and copies_ms together.
        speedup:                over dense.
        share_of_ideal:         ideal_ms over ms.
        rows_used:              rows of matrix products that hold a (row, head), of all.
        longest_over_makespan:  the longest program over its launch.
        programs, scratch_mb
    """
    chosen = layers(case)[: LAYERS if case.pattern == SEARCHED else 1]
    chunk = RequestChunk(conversation(case), case.tokens - case.rows, case.tokens, 0, torch.arange(case.tokens))
    narrow, wide = (BatchPlanner([chunk], case.rows, block_k=block_k) for block_k in (64, 128))
    of_layers = [_layer(case, narrow.plan(heads), wide.plan(heads)) for heads in chosen]
    return {
        name: {figure: _short(mean(layer[name][figure] for layer in of_layers)) for figure in figures}
        for name, figures in of_layers[0].items()
    }


def _short(value: float) -> float:
    """Four digits, which is more than a model tells."""
    return float(f"{value:.4g}")


def _layer(case: Case, narrow: BlockPlan, wide: BlockPlan) -> dict[str, Figures]:
    """The figures of one layer, from its plans with key tiles of 64 and of 128 keys."""
    heads, kv_heads = SHAPES[case.shape]
    group, value = heads // kv_heads, HEAD_DIM * ELEMENT
    out = case.rows * heads * value
    alone = [_programs(plan, group) for plan in narrow.passes]
    triton, fa4 = (work_items(plan, group, ROWS) for plan in (narrow, wide))
    by_kv_head = np.argsort(fa4.heads[fa4.table[:, FIRST_HEAD]] // group, kind="stable")  # its grid is in this order
    read_again = sum(int(rows.sum()) for rows, _ in alone[1:]) * value  # a pass joins what earlier ones have written
    scratch = triton.num_slots * ROWS * (HEAD_DIM + 1) * SUM
    queries, keys = fa4.num_items * ROWS * value, visited_keys(wide) * kv_heads * 2 * value
    engines = {
        "before": Engine(  # out is filled with zeros first
            [Launch(rows, visits) for rows, visits in alone], narrow.block_k, 0, out + read_again
        ),
        "triton": Engine(
            [Launch(triton.table[:, NUM_PAIRS], triton.visits)],
            narrow.block_k,
            scratch,
            2 * scratch + (out if triton.merges else 0),
        ),
    }
    fa4_launch = Launch(fa4.table[by_kv_head, NUM_PAIRS], fa4.visits[by_kv_head])
    for name, copied in (("fa4_gathered", keys), ("fa4_paged", 0)):
        used = copied + 2 * queries  # as many results as queries; all of it is written once and read once
        engines[name] = Engine([fa4_launch], wide.block_k, used, 2 * used + out)

    pairs = measure.causal_pairs(case.rows, case.tokens)
    density = measure.visited_pairs(narrow) / pairs
    dense_ms = _card_us(pairs * heads, DENSE) / 1e3
    layer = {"density": density, "dense_ms": dense_ms, "ideal_ms": density * dense_ms}
    return {"layer": layer} | {name: engine.figures(RATES[name], layer) for name, engine in engines.items()}


@dataclass(frozen=True)
class Launch:
    """The programs of one launch, in their order: the rows that each uses, and the key tiles that it visits."""

    rows: NDArray[np.int64]
    visits: NDArray[np.int64]


@dataclass(frozen=True)
class Engine:
    """How a layer runs: launches one after the other, each on all key tiles of `block_k` keys; bytes of its scratch,
    and bytes that it reads and writes beside the programs."""

    launches: list[Launch]
    block_k: int
    scratch: int = 0
    traffic: int = 0

    def figures(self, rate: float, layer: Figures) -> Figures:
        """See `modelled`. rate: TFLOP/s on full tiles."""
        tile_us = _card_us(ROWS * self.block_k, rate) * PROCESSORS
        times = [(launch.visits * tile_us + PROGRAM_US).tolist() for launch in self.launches]
        spans = [makespan(launch) for launch in times]
        ms = sum(spans) / 1e3 + self.traffic / BANDWIDTH / 1e9
        rows, visits = (np.concatenate([getattr(x, name) for x in self.launches]) for name in ("rows", "visits"))
        return {
            "ms": ms,
            "programs_ms": sum(spans) / 1e3,
            "copies_ms": self.traffic / BANDWIDTH / 1e9,
            "speedup": layer["dense_ms"] / ms,
            "share_of_ideal": layer["ideal_ms"] / ms,
            "rows_used": float(rows @ visits) / float(ROWS * visits.sum()),
            "longest_over_makespan": max(max(launch) / span for launch, span in zip(times, spans)),
            "programs": len(rows),
            "scratch_mb": self.scratch / 1e6,
        }


def _programs(plan: BlockPlan, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and visits of the programs before work items, in their order: classes of about one length, the longest
    first; in a class, by KV head, then by tile."""
    heads = [(number, head) for number, heads in enumerate(plan.head_groups) for head in heads]
    by_group = [np.array([head for n, head in heads if n == number]) for number in range(len(plan.head_groups))]
    sizes = plan.sizes
    counts = np.array([len(own) for own in by_group])[sizes.group]
    tile = np.repeat(np.arange(plan.num_tiles), counts)
    head = np.concatenate([by_group[number] for number in sizes.group]) if plan.num_tiles else tile
    order = np.lexsort((head, tile, head // group, -np.frexp(sizes.visits[tile].astype(np.float64))[1]))
    return sizes.rows[tile[order]], sizes.visits[tile[order]]


def _card_us(pairs: float, rate: float) -> float:
    """Microseconds of the whole card for both products of some (row, key) pairs, at `rate` TFLOP/s."""
    return 4 * HEAD_DIM * pairs / rate / 1e6


def makespan(times: Iterable[float]) -> float:
    """When the last of some programs ends that `PROCESSORS` multiprocessors take up in this order."""
    free = [0.0] * PROCESSORS
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def visited_keys(plan: BlockPlan) -> int:
    """How many keys a plan visits in some tile, each counted once, and once more for each gathered key tile."""
    slots = plan.keys.kv_slots.view(-1, plan.block_k).long()
    tiles = torch.zeros(len(slots), dtype=torch.bool)
    tiles[plan.block_indices[: int(plan.block_indptr[-1])].long()] = True
    keys = torch.zeros(int(slots.max()) + 1, dtype=torch.bool)
    keys[slots[tiles]] = True
    return int(keys.sum()) + int(plan.num_gathered.sum()) * plan.block_k


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("sglang_mminfer/benchmarks/results/makespan.json"))
    options = parser.parse_args(arguments)
    modelled_cases = {}
    for case in cases():
        modelled_cases[case.name] = modelled(case)
        print(f"{case.name}: {_line(modelled_cases[case.name])}", flush=True)
    assumed = {"dense_tflops": DENSE, "tflops": RATES, "program_us": PROGRAM_US, "memory_tb_s": BANDWIDTH}
    report = {
        **machine.describe(),
        "assumed": {**assumed, "multiprocessors": PROCESSORS, "rows_of_a_program": ROWS},
        "cases": modelled_cases,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


def _line(figures: dict[str, Figures]) -> str:
    layer = figures["layer"]
    engines = (
        f"{name} {figures[name]['ms']:.3g} ms ({figures[name]['speedup']:.1f} x, "
        f"{figures[name]['share_of_ideal']:.0%} of ideal)"
        for name in RATES
    )
    return f"density {layer['density']:.1%}, dense {layer['dense_ms']:.3g} ms, {', '.join(engines)}"


if __name__ == "__main__":
    raise SystemExit(main())

"""What choosing keys by low-rank scores should take on an H100, as a share of dense attention: a model.

    python -m sglang_mminfer.benchmarks.selection_cost [--out FILE]

No clock is read and no GPU is needed. The scan's loop is compiled for sm_90 and its instructions are counted; its time
is what the matrix unit takes or what the instructions take, whichever is longer ("least"), or one after the other
("most"): programs of the same multiprocessor take turns, how well nobody has measured. The other kernels take as long
as their bytes and products. Dense attention and attention of the keys that were picked run at the rates of
`makespan.py`.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from sglang_mminfer.benchmarks import makespan, measure
from sglang_mminfer.benchmarks.cases import CHUNK, HEAD_DIM, SHAPES, K
from sglang_mminfer.kernels.triton import ahead_of_time, low_rank_scan
from sglang_mminfer.patterns.adaptive import QUERY_ROWS
from sglang_mminfer.patterns.choice import ROOM
from sglang_mminfer.tools import machine

# ---- assumptions ---------------------------------------------------------------------------------------------

PEAK = {"bf16": 989.0, "fp8": 1979.0}
"""TFLOP/s of an H100's matrix unit, from its data sheet."""

DENSE = {"bf16": makespan.DENSE, "fp8": 1200.0}
"""TFLOP/s of dense attention. fp8: FlashAttention-3 is published with close to 1,200."""

PICKED = {"bf16": makespan.RATES["triton"], "fp8": makespan.RATES["triton"] * DENSE["fp8"] / DENSE["bf16"]}
"""TFLOP/s of attention over the keys that were picked. fp8: as much more as dense gains, which is
more than the executors reach: they convert an fp8 cache to the dtype of the queries."""

PRODUCTS_OF_A_CYCLE = 4096
"""FLOP of the matrix unit of one multiprocessor in a cycle, in halves."""

SLOW = ("VIMNMX", "VIMNMX3", "ISETP", "SEL", "LOP3", "IADD3", "VIADD", "PRMT", "LEA")
"""Instructions of which a multiprocessor runs 64 lanes in a cycle, half of what it issues (CUDA programming guide,
throughput of integer and comparison instructions)."""

SINK, LOCAL = 64, 256
"""Tokens that every row sees."""

SHARES = (0.01, 0.05)
"""Keys that a query tile picks, of all between its sink and its window: what was seen on the needle models."""

LANE_BYTES = 24
"""Bytes that are written and read for each lane of picked keys for which there is room: its number, its position and
cache row, and the key table that all of them join."""

BUDGET = 0.5
"""Of `Adaptive`: what a query tile may pick, and so what there is room for, up to `choice.ROOM`."""

# ---- what is modelled ----------------------------------------------------------------------------------------

SHAPE = "28/4"
LENGTHS = (8 * K, 32 * K, 128 * K, 1024 * K)
RANKS = (8, 16, 32)

Figures = dict[str, float]


def cycles_of_a_score(rank: int, loop: dict[str, int]) -> tuple[float, float]:
    """Cycles of a multiprocessor for one score: of the matrix unit, and of all other instructions.

    Args:
        loop: `ahead_of_time.scan_loop`, for sm_90.
    """
    scan = low_rank_scan.configuration(90)
    scores = scan.keys * scan.heads * scan.rows
    issued = sum(loop.values()) * scan.num_warps / 4  # four schedulers
    slow = 2 * sum(loop.get(name, 0) for name in SLOW) * scan.num_warps / 4
    return 2 * low_rank_scan.width_of(rank) / PRODUCTS_OF_A_CYCLE, max(issued, slow) / scores


def modelled(tokens: int, rank: int, dtype: str, loop: dict[str, int]) -> dict[str, float | Figures]:
    """One layer, the last `CHUNK` rows of a prompt. Shares are of dense attention's time.

    Returns:
        dense_ms; keys_mb: the low-rank keys of the layer, kept while it is planned;
        keys:                    share of projecting the keys;
        queries:                 of projecting the queries, with the bounds of their rows;
        scan_least, scan_most:   of the scan;
        packing:                 of collecting what was picked;
        selection_least, _most:  all of these;
        gather:                  of attention over sink, window and picked keys, by the share that is picked;
        speedup_least, _most:    dense over selection and gather, by the share that is picked.
    """
    rows, (heads, kv_heads) = min(CHUNK, tokens), SHAPES[SHAPE]
    value, width = 1 if dtype == "fp8" else 2, low_rank_scan.width_of(rank)
    pairs = measure.causal_pairs(rows, tokens)
    dense_us = 4 * HEAD_DIM * heads * pairs / DENSE[dtype] / 1e6

    def copied_us(num_bytes: float) -> float:
        return num_bytes / makespan.BANDWIDTH / 1e6

    keys_us = copied_us(tokens * kv_heads * (HEAD_DIM * value + 2 * width))
    exact = rows * heads * (SINK + LOCAL + QUERY_ROWS)  # scores of sink and window
    queries_us = copied_us(rows * heads * (HEAD_DIM * value + 2 * width)) + 2 * HEAD_DIM * exact / PICKED[dtype] / 1e6
    between = max(0, pairs - rows * (SINK + LOCAL))
    matrix, others = cycles_of_a_score(rank, loop)
    cycles = PEAK["bf16"] * 1e6 / PRODUCTS_OF_A_CYCLE  # of all multiprocessors together, in a microsecond
    scan_least, scan_most = (between * heads * each / cycles for each in (max(matrix, others), matrix + others))
    of_tiles = between / QUERY_ROWS * heads  # (query tile, key, head)
    packing_us = copied_us(2 * of_tiles + LANE_BYTES * min(ROOM, BUDGET * of_tiles))

    def gather_us(share: float) -> float:
        visited = rows * min(tokens, SINK + LOCAL + QUERY_ROWS) + share * between
        return 4 * HEAD_DIM * heads * visited / PICKED[dtype] / 1e6

    least, most = (keys_us + queries_us + scan + packing_us for scan in (scan_least, scan_most))
    parts = {
        "keys": keys_us,
        "queries": queries_us,
        "scan_least": scan_least,
        "scan_most": scan_most,
        "packing": packing_us,
        "selection_least": least,
        "selection_most": most,
    }
    gathers = {share: gather_us(share) for share in SHARES}
    return {
        "dense_ms": _short(dense_us / 1e3),
        "keys_mb": _short(tokens * kv_heads * 2 * width / 1e6),
        **{name: _short(part / dense_us) for name, part in parts.items()},
        "gather": {str(share): _short(own / dense_us) for share, own in gathers.items()},
        "speedup_least": {str(share): _short(dense_us / (most + own)) for share, own in gathers.items()},
        "speedup_most": {str(share): _short(dense_us / (least + own)) for share, own in gathers.items()},
    }


def _short(value: float) -> float:
    """Three digits, which is more than a model tells."""
    return float(f"{value:.3g}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("sglang_mminfer/benchmarks/results/selection_cost.json"))
    options = parser.parse_args(arguments)
    loops = {rank: ahead_of_time.scan_loop(rank) for rank in RANKS}
    report = {
        **machine.describe(),
        "what": "a model from compiled code, not a measurement",
        "assumed": {
            "matrix_unit_tflops": PEAK,
            "dense_tflops": DENSE,
            "picked_tflops": PICKED,
            "memory_tb_s": makespan.BANDWIDTH,
            "picked_shares": SHARES,
            "heads": SHAPE,
            "head_dim": HEAD_DIM,
            "rows": CHUNK,
        },
        "loops": loops,
        "cycles_of_a_score": {
            rank: dict(zip(("matrix_unit", "others"), map(_short, cycles_of_a_score(rank, loop))))
            for rank, loop in loops.items()
        },
        "key_bytes_of_a_token_and_kv_head": {rank: 2 * low_rank_scan.width_of(rank) for rank in RANKS},
    }
    cases = {}
    for tokens, rank, dtype in product(LENGTHS, RANKS, DENSE):
        figures = modelled(tokens, rank, dtype, loops[rank])
        cases[f"{tokens} keys, rank {rank}, {dtype}"] = figures
        print(
            f"{tokens // K}K keys, rank {rank}, {dtype}: dense {figures['dense_ms']} ms, selection "
            f"{figures['selection_least']:.1%} to {figures['selection_most']:.1%} (scan {figures['scan_least']:.1%} to "
            f"{figures['scan_most']:.1%}), picked keys {figures['gather']}, "
            f"speed-up {figures['speedup_least']} to {figures['speedup_most']}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**report, "cases": cases}, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

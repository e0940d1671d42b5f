"""What selectors keep of synthetic heads whose attention is known, at which density.

    python -m sglang_mminfer.benchmarks.selectors [--tokens N] [--head-dim D] [--out FILE]

Every selector runs over its own knob on every kind of `planted_heads.py`. The planner makes its plan, the torch
executor computes it, and low-rank forms of q . k come from another draw of the same head. The figures of a point are:

    density    visited over causal (row, key) pairs; with mean correction, mean keys count as keys
    recall     the share of dense attention's mass that is visited, mean over rows
    error      of the output, over the output: root mean squares over all rows
    choosing   processor time of the plan, over that of dense attention by the same executor

Mean correction is computed in plain torch from what the plan leaves out, because plans have no keys that stand for
others. Densities are those of query tiles of 128 rows, or 64 of `adaptive`; a curve ends where it gets dense.
"at_density" has each selector's error at the same densities, read off its curve; null where it cannot be that sparse.
Curves that are in FILE already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from sglang_mminfer.benchmarks.planted_heads import KINDS, Draw, conversation, draw
from sglang_mminfer.kernels import torch_gather
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.basis import Basis, basis_of, second_moments
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.pooled_blocks import PooledBlocks
from sglang_mminfer.patterns.pooled_queries import PooledQueries
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.patterns.vertical_slash import VerticalSlash
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.planning.tiles import BLOCK_Q
from sglang_mminfer.planning.visited import visited_rows
from sglang_mminfer.tools import machine

SINK, LOCAL = 64, 256
"""What the selectors that choose always keep."""

WINDOWS = (64, 256, 512, 1024, 2048, 4096)
ALPHAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0005, 0.00025, 0.0001)
OF_MAXIMUM = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.03, 0.01, 0.003, 0.001)
NEAR_MAXIMUM = (1.0, 0.99, 0.98, 0.97, 0.95, 0.93, *OF_MAXIMUM[1:])
PICKS = ((16, 1), (16, 4), (32, 16), (64, 32), (64, 64), (256, 64), (256, 256), (1000, 256), (1000, 1000))
"""What the knobs go through, the sparsest first: windows; bounds relative to a mass, to a maximum, and to one of sums,
which differ less; and columns and diagonals."""

MOST = 0.5
"""A curve ends behind this density."""

RANK = 16
"""The rank of the basis; smaller ranks take its first rows."""

DENSITIES = (0.13, 0.15, 0.2, 0.3)
HEADS = 2
"""Draws of each kind; figures are their means."""

ADAPTIVE = ("adaptive, rank 4", "adaptive, rank 8", "adaptive, rank 16")
EXACT = "adaptive, exact scores"
STATIC = ("a_shape", "tri_shape", "grid", "vertical_slash")
CORRECTED = "pooled_blocks, mean correction"
POOLED = ("pooled_blocks", CORRECTED, "pooled_queries", "pooled_queries, one maximum")

Point = dict[str, float]


@dataclass(frozen=True)
class Selector:
    """A curve: patterns by the value of their knob. rank: dimensions of scores that come from a basis; 0: no basis.
    corrected: what is left out enters by its mean key and value."""

    patterns: dict[str, Pattern]
    rank: int = 0
    corrected: bool = False


def selectors(tokens: int) -> dict[str, Selector]:
    """All of them, for a prompt of so many tokens. A curve's patterns stand in the order of their densities."""
    windows = [size for size in WINDOWS if size < tokens]
    blocks: dict[str, Pattern] = {f"{a:g}": PooledBlocks(SINK, LOCAL, a) for a in NEAR_MAXIMUM}
    lines = {
        "a_shape": Selector({f"{size}": AShape(SINK, size) for size in windows}),
        "tri_shape": Selector({f"{size}": TriShape(SINK, size, 0) for size in windows}),
        "grid": Selector({f"{size}": Grid("frame", False, False, True, 0, SINK, size) for size in windows}),
        "vertical_slash": Selector({f"{v},{s}": VerticalSlash(v, s) for v, s in PICKS}),
        "pooled_blocks": Selector(blocks),
        CORRECTED: Selector(blocks, corrected=True),
        "pooled_queries": Selector({f"{a:g}": PooledQueries(SINK, LOCAL, a) for a in OF_MAXIMUM}),
        "pooled_queries, one maximum": Selector(
            {f"{a:g}": PooledQueries(SINK, LOCAL, a, span=tokens) for a in OF_MAXIMUM}
        ),
    }
    for name, rank in zip(ADAPTIVE, (4, 8, 16)):
        lines[name] = Selector({f"{a:g}": Adaptive(SINK, LOCAL, rank, a, 1.0) for a in ALPHAS}, rank)
    lines[EXACT] = Selector({f"{a:g}": Adaptive(SINK, LOCAL, 1, a, 1.0) for a in ALPHAS})
    return lines


class Head:
    """One draw of a planted head, with what dense attention gives."""

    def __init__(self, chat: ModalityMap, own: Draw, basis: Basis | None = None) -> None:
        self.draw, self.basis, self.tokens = own, basis, chat.length
        self.chunk = RequestChunk(chat, 0, chat.length, 0, torch.arange(chat.length))
        self.out, self.lse, _, self.dense_s = self.attend(self.plan(Dense())[0])

    @classmethod
    def of(cls, kind: str, tokens: int, head_dim: int, number: int) -> Head:
        """The basis is that of another draw."""
        chat = conversation(tokens)
        other, own = (draw(kind, chat.length, head_dim, number, i) for i in range(2))
        basis = basis_of(second_moments(other.q), second_moments(other.k), min(RANK, head_dim))
        return cls(chat, own, basis)

    def plan(self, pattern: Pattern, rank: int = 0) -> tuple[BlockPlan, float]:
        """And the seconds of processor time that it took."""
        planner = BatchPlanner([self.chunk], self.tokens)
        start, own = time.process_time(), self.draw
        plan = planner.plan([pattern], own.q, own.k, own.sm_scale, self.basis if rank else None)
        return plan, time.process_time() - start

    def attend(self, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """[tokens, 1, D], its base-2 LSE [tokens, 1], density, and seconds of processor time."""
        own = self.draw
        out, lse = torch.empty_like(own.q), torch.empty(own.q.shape[:2])
        start = time.process_time()
        torch_gather.run(own.q, own.k, own.v, plan, own.sm_scale, out, lse)
        return out, lse, int(plan.visited_by_row.sum()) / self.chunk.causal_pairs, time.process_time() - start

    def measure(self, pattern: Pattern, rank: int = 0, corrected: bool = False) -> Point:
        """See the head of this file."""
        plan, seconds = self.plan(pattern, rank)
        out, lse, density, _ = self.attend(plan)
        recall = float((lse - self.lse).exp2().mean())
        if corrected and isinstance(pattern, PooledBlocks):
            visited = visited_rows(plan, 0, torch.arange(self.tokens), self.tokens)
            out, mean_keys = with_means(self.draw, out, lse, visited, pattern.block)
            density += mean_keys / self.chunk.causal_pairs
        error = float((out - self.out).square().sum().sqrt() / self.out.square().sum().sqrt())
        return {"density": density, "recall": recall, "error": error, "choosing": seconds / self.dense_s}


def with_means(
    own: Draw, out: torch.Tensor, lse: torch.Tensor, visited: torch.Tensor, block: int
) -> tuple[torch.Tensor, int]:
    """The output with mean correction, and how many (row, mean key) pairs it took: every key block that lies before a
    row's query tile, and of which the row visits nothing, enters the softmax with its mean key and value and the weight
    of its keys.

    Args:
        out, lse: of what is visited. visited: bool [tokens, tokens].
    """
    tokens = len(visited)
    blocks = tokens // block
    k, v = (x[: blocks * block, 0].unflatten(0, (-1, block)).mean(dim=1) for x in (own.k, own.v))
    first_row = torch.arange(tokens) // BLOCK_Q * BLOCK_Q
    left_out = ~visited[:, : blocks * block].unflatten(1, (-1, block)).any(dim=2)
    left_out &= (torch.arange(blocks) + 1) * block <= first_row[:, None]
    logits = (own.q[:, 0] @ k.T * own.sm_scale + math.log(block)).masked_fill(~left_out, -torch.inf)
    lse_of_means = logits.logsumexp(dim=1, keepdim=True)
    of_means = (logits - lse_of_means).exp().nan_to_num(0) @ v
    joined, _ = torch_gather.merge_state(out, lse, of_means[:, None], lse_of_means / math.log(2))
    return joined, int(left_out.sum())


def at_density(points: Iterable[Point], density: float) -> float | None:
    """The least error at a density on the line through the points, or at a smaller one; None: all points are denser."""
    best, last = None, None
    for point in sorted(points, key=lambda point: point["density"]):
        if point["density"] > density:
            if last is not None and best is not None:
                share = (density - last["density"]) / (point["density"] - last["density"])
                best = min(best, last["error"] + share * (point["error"] - last["error"]))
            break
        last, best = point, point["error"] if best is None else min(best, point["error"])
    return best


def curves_of(kind: str, tokens: int, head_dim: int, known: dict[str, dict[str, Point]]) -> dict[str, dict[str, Point]]:
    """Name of the selector -> value of its knob -> point. known: those of them that need not be measured."""
    lines, curves = selectors(tokens), {}
    heads = [Head.of(kind, tokens, head_dim, number) for number in range(HEADS)] if lines.keys() - known else []
    for name, line in lines.items():
        curves[name] = known[name] if name in known else _curve(heads, line)
        print(f"{kind}, {name}: {_line(curves[name])}", flush=True)
    return curves


def _curve(heads: list[Head], line: Selector) -> dict[str, Point]:
    curve = {}
    for knob, pattern in line.patterns.items():
        points = [head.measure(pattern, line.rank, line.corrected) for head in heads]
        curve[knob] = {figure: float(f"{mean(point[figure] for point in points):.4g}") for figure in points[0]}
        if curve[knob]["density"] > MOST:
            break
    return curve


def _line(points: dict[str, Point]) -> str:
    return "; ".join(f"{p['density']:.3f} {p['recall']:.3f} {p['error']:.3f}" for p in points.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mminfer.benchmarks.selectors", description="What selectors keep of planted heads."
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the conversation; default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("sglang_mminfer/benchmarks/results/selectors.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Head.of("columns", 1024, options.head_dim, 0).measure(Adaptive(SINK, LOCAL, 1, 0.1), 1)  # compiles what is compiled
    sizes = {"tokens": conversation(options.tokens).length, "head_dim": options.head_dim, "heads": HEADS}
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    curves = done["curves"] if sizes.items() <= done.items() else {}
    for kind in options.kind or KINDS:
        curves[kind] = curves_of(kind, options.tokens, options.head_dim, curves.get(kind, {}))
        _write(options.out, sizes, {kind: curves[kind] for kind in KINDS if kind in curves})
    print(f"written to {options.out}")
    return 0


def _write(out: Path, sizes: dict[str, int], curves: dict[str, dict[str, dict[str, Point]]]) -> None:
    errors = {
        kind: {
            name: {f"{density:g}": at_density(curve.values(), density) for density in DENSITIES}
            for name, curve in of_kind.items()
        }
        for kind, of_kind in curves.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {**machine.describe(), **sizes, "at_density": errors, "curves": curves}
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())

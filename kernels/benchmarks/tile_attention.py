"""The Triton kernel against dense attention on one GPU, in one run: the chunked shape and the whole prompt.

    python -m sglang_mminfer.kernels.benchmarks.tile_attention [--minutes 7] [--out FILE]

Dense is torch's `scaled_dot_product_attention` on its cuDNN backend, the FlashAttention-3 class where FA3 itself is
not installed. Cases are run shortest first; the result file is written after each, and cases it already has are
skipped, so that a run that was cut short goes on where it stopped.

`TRITON_INTERPRET=1 ... --tiny` runs one very small case on a CPU: it shows that the program works, and its times
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.kernels.triton import launch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sglang_mminfer.evaluation import machine
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.plan import BatchPlanner, RequestChunk
from sglang_mminfer.patterns.spec import AShape, Grid, Pattern

HEAD_DIM = 128
CELLS = 256  # tokens of a frame, 16 x 16
CHUNK = 8192
PATTERNS: dict[str, Pattern] = {
    "grid": Grid("frame", True, True, True, 0, 128, 1024),
    "grid, wide window": Grid("frame", True, False, True, 0, 128, 8192),
    "a_shape": AShape(1024, 8192),
}
SHAPES = {"28/4": (28, 4), "32/8": (32, 8)}
TINY = {"2/1": (2, 1)}


@dataclass(frozen=True)
class Case:
    """`rows` last queries of a prompt of `tokens`, all heads with one pattern."""

    shape: str
    tokens: int
    rows: int
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.shape} heads, {self.tokens} keys, {self.rows} rows, {self.pattern}"


def cases(tiny: bool) -> Iterator[Case]:
    if tiny:
        yield Case("2/1", 512, 64, "grid")
        return
    for exponent, shape, pattern in product(range(15, 21), SHAPES, PATTERNS):
        tokens = 1 << exponent
        yield Case(shape, tokens, CHUNK, pattern)
        if tokens <= 1 << 18 or (shape, pattern) == ("28/4", "grid"):
            yield Case(shape, tokens, tokens, pattern)


def video_map(tokens: int) -> ModalityMap:
    """One video, with 64 tokens of text before it and what is left after it."""
    frames = (tokens - 128) // CELLS
    stop = 64 + frames * CELLS
    grid = VisionGrid(frames, 16, 16, tuple(range(64, stop, CELLS)))
    return ModalityMap(
        [
            Segment(Modality.TEXT, 0, 64),
            Segment(Modality.VIDEO, 64, stop, grid),
            Segment(Modality.TEXT, stop, tokens),
        ]
    )


def measure(case: Case, device: str, dense_ms: dict[tuple[str, int, int], float]) -> dict[str, Any]:
    heads, kv_heads = (SHAPES | TINY)[case.shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(case.rows, heads, HEAD_DIM, device=device, dtype=dtype)
    k, v = (torch.randn(case.tokens, kv_heads, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    slots = torch.randperm(case.tokens, device=device)  # the pool of a server that has been up for a while
    start = time.perf_counter()
    chunk = RequestChunk(video_map(case.tokens), case.tokens - case.rows, case.tokens, 0, slots)
    plan = BatchPlanner([chunk], case.rows).plan([PATTERNS[case.pattern]] * heads)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    scale = HEAD_DIM**-0.5
    launch.run(q, k, v, plan, scale, out, lse)
    _wait(device)
    first_ms = (time.perf_counter() - start) * 1e3
    sparse_ms = timed(lambda: launch.run(q, k, v, plan, scale, out, lse), device)
    visited = visited_pairs(plan)
    causal = case.rows * (2 * case.tokens - case.rows + 1) / 2
    shape = (case.shape, case.tokens, case.rows)
    if shape not in dense_ms:
        dense_ms[shape] = timed(lambda: dense(q, k, v, scale), device, repeats=3)
    flop = 4 * HEAD_DIM * heads
    density = visited / causal
    return {
        "density": round(density, 4),
        "plan_and_first_ms": round(first_ms, 3),
        "sparse_ms": round(sparse_ms, 3),
        "dense_ms": round(dense_ms[shape], 3),
        "speedup": round(dense_ms[shape] / sparse_ms, 3),
        "share_of_ideal": round(dense_ms[shape] / sparse_ms * density, 3),
        "tflops_on_visited_tiles": round(visited * flop / sparse_ms / 1e9, 1),
        "tflops_dense": round(causal * flop / dense_ms[shape] / 1e9, 1),
        "index_bytes": index_bytes(plan),
        "kv_bytes": k.nbytes + v.nbytes,
    }


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[rows, Hq, D]. Causal where all rows are there; a chunk of last rows sees all keys, which is 0 to 12 % more."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    causal = q.shape[2] == k.shape[2]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def visited_pairs(plan: PrefillPlan) -> float:
    """(row, key) pairs of visited tiles for one head, those above the diagonal included: what is computed."""
    pairs = 0.0
    for block_plan in plan.passes:
        rows, blocks = block_plan.q_indptr.diff().double(), block_plan.block_indptr.diff().double()
        shares = torch.tensor([len(heads) for heads in block_plan.head_groups], device=rows.device)
        pairs += float((rows * blocks * shares[block_plan.q_heads.long()]).sum()) * block_plan.block_k / plan.num_heads
    return pairs


def index_bytes(plan: PrefillPlan) -> int:
    """Of everything the kernel is given beside q, k and v."""
    tensors: dict[int, torch.Tensor] = {}
    for block_plan in plan.passes:
        for holder in (block_plan, block_plan.keys):
            tensors |= {x.data_ptr(): x for x in vars(holder).values() if isinstance(x, torch.Tensor)}
    return sum(x.nbytes for x in tensors.values())


def timed(work: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Milliseconds, the median of `repeats` runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=7.0, help="start no case after this long")
    parser.add_argument("--tiny", action="store_true", help="one small case, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("kernels/benchmarks/results/gpu_tile_attention.json"))
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("expected a GPU; --tiny with TRITON_INTERPRET=1 runs one small case without")
    report: dict[str, Any] = {**machine.describe(), "cases": {}}
    if options.out.exists():
        report = json.loads(options.out.read_text())
    dense_ms: dict[tuple[str, int, int], float] = {}
    began = time.monotonic()
    for case in cases(options.tiny):
        if case.name in report["cases"]:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print("time is up; run again to go on")
            break
        report["cases"][case.name] = measure(case, device, dense_ms)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        print(case.name, report["cases"][case.name], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

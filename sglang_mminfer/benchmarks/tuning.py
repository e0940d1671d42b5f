"""Times the candidate builds of the kernel for every head dim, and names the fastest.

    python -m sglang_mminfer.benchmarks.tile_attention --tune

Enter the result into `kernels/triton/configurations.py` by hand. What is fastest depends on the GPU and on Triton's
version, so both are in the result file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sglang_mminfer.benchmarks import measure
from sglang_mminfer.benchmarks.cases import CHUNK, PATTERNS, ROW, TARGET, video_map
from sglang_mminfer.benchmarks.inputs import Inputs, make_inputs
from sglang_mminfer.kernels.triton import launch
from sglang_mminfer.kernels.triton.configurations import HEAD_DIMS, Configuration, configuration
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.planning.tiles import BLOCK_K
from sglang_mminfer.tools import machine

HEADS = (28, 4)
TUNED_ON = (ROW, "a_shape", "grid frame")  # many lines and few, with and without gathered tiles


def candidates(head_dim: int) -> Iterator[tuple[str, Configuration, int]]:
    """(name, how to compile, keys of a key tile).

    Head dim 256 takes 64 rows, because 128 rows spill registers. No candidate has two programs of 128 rows at 128
    registers a thread: the assembler would serialise their products.
    """
    rows = 64 if head_dim == 256 else 128
    yield "one program, 7 stages", Configuration(rows, 8, 7), 64
    yield "wide key tiles", Configuration(rows, 8, 4), 128
    yield "wide key tiles, 3 stages", Configuration(rows, 8, 3), 128
    yield "4 stages", Configuration(rows, 8, 4), 64
    yield "3 stages", Configuration(rows, 8, 3), 64
    yield "2 stages", Configuration(rows, 8, 2), 64
    yield "64 rows, 4 warps, 4 stages", Configuration(64, 4, 4), 64  # two programs with no limit on registers
    yield "64 rows, 4 warps, 3 stages", Configuration(64, 4, 3), 64


def main(out: Path, device: str, tiny: bool, minutes: float) -> int:
    """Time all candidates, head dim 128 first. Prints each and writes `out` after it. Returns the exit status."""
    report: dict[str, Any] = {**machine.describe(), "card": measure.describe_card(), "timing": measure.METHOD}
    report |= {"patterns": TUNED_ON, "heads": HEADS, "head_dims": {}}
    tokens, rows = (512, 128) if tiny else (TARGET, CHUNK)
    began = time.monotonic()
    for head_dim in (128,) if tiny else sorted(HEAD_DIMS, key=lambda dim: dim != 128):
        builds: dict[str, Any] = report["head_dims"].setdefault(str(head_dim), {})
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        inputs = make_inputs(rows, tokens, (2, 1) if tiny else HEADS, head_dim, dtype, device, "shuffled")
        for name, chosen, block_k in candidates(head_dim):
            if time.monotonic() - began > 60 * minutes:
                break
            builds[name] = {**asdict(chosen), "block_k": block_k, **_timed(inputs, chosen, block_k, device)}
            print(f"head dim {head_dim}: {name}: {_summary(builds[name])}", flush=True)
            _write(out, report)
        timed = {name: figures["tflops"] for name, figures in builds.items() if "tflops" in figures}
        if timed:
            builds["best"] = max(timed, key=lambda name: timed[name])
            print(f"head dim {head_dim}: best: {builds['best']}; in use: {_in_use(head_dim, device)}")
        _write(out, report)
    print(f"Results: {out}")
    return 0


def _timed(inputs: Inputs, chosen: Configuration, block_k: int, device: str) -> dict[str, Any]:
    """TFLOP/s on visited tiles, for each pattern and for all together, or the error."""
    rows, heads, head_dim = inputs.q.shape
    tokens = len(inputs.keys)
    chunk = RequestChunk(video_map(tokens), tokens - rows, tokens, 0, inputs.slots)
    flop = ms = 0.0
    by_pattern = {}
    try:
        for pattern in TUNED_ON:
            plan = BatchPlanner([chunk], rows, block_k=block_k).plan([PATTERNS[pattern]] * heads)
            args = (inputs.q, inputs.k_cache, inputs.v_cache, plan, inputs.scale, inputs.out, inputs.lse)
            timing = measure.timed(lambda args=args: launch.run(*args, chosen=chosen), device)  # type: ignore[misc]
            plan_flop = measure.visited_pairs(plan) * 4 * head_dim * heads
            by_pattern[pattern] = float(f"{plan_flop / timing.ms / 1e9:.5g}")
            flop, ms = flop + plan_flop, ms + timing.ms
    except Exception as error:  # a build may need too much shared memory, for example, and that is a result, too
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"tflops": float(f"{flop / ms / 1e9:.5g}"), "by_pattern": by_pattern}


def _summary(figures: dict[str, Any]) -> str:
    return figures["error"].splitlines()[0] if "error" in figures else f"{figures['tflops']:.0f} TFLOP/s"


def _in_use(head_dim: int, device: str) -> str:
    if device == "cpu":
        return "nothing is compiled here"
    major, minor = torch.cuda.get_device_capability()
    return f"{configuration(head_dim, 10 * major + minor)}, {BLOCK_K} keys a tile"


def _write(out: Path, report: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")

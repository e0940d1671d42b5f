"""What planning one chunk costs: the last chunk of a conversation, config `grid_static`, on one core.

    python -m sglang_mminfer.benchmarks.plan_time [--before REVISION] [--case NAME ...] [--out FILE.json]

Each case is planned in a process of its own, by the files of this checkout and, with --before, by those of an earlier
git revision. The figures of a case are:

    first_ms                  processor time of the first planning, which also reads the map
    plan_ms, clock_ms         processor time and wall-clock time of a later planning of the same chunk, the least
    peak_mb                   how much the first planning added to the process's peak memory
    visits, query_tiles       (query tile, key tile) pairs and query tiles of the plan
    estimate_ms, estimate_mb  the cost that the planning budget estimates
    decide_ms                 processor time of that estimate
    sparse                    whether a server with the default budget would plan the chunk

Cases of `layer_plans.py` follow: the plans of all layers, with one pattern and with a config as a search finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_mminfer.benchmarks import layer_plans
from sglang_mminfer.benchmarks.import_time import unpacked
from sglang_mminfer.tools import machine

CHUNK = 8192

# The kind and the number of media, tokens of text before each; then, for each medium: frames, tokens between frames,
# rows, columns.
CASES: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "250 images of 4 tokens": ("image", 250, 3, 1, 0, 2, 2),
    "4,000 images of 4 tokens": ("image", 4000, 3, 1, 0, 2, 2),
    "16,000 images of 4 tokens": ("image", 16000, 3, 1, 0, 2, 2),
    "10,000 one-pixel frames, one video": ("video", 1, 3, 10000, 0, 1, 1),
    "10,000 one-pixel frames with timestamps, one video": ("video", 1, 3, 10000, 3, 1, 1),
    "10,000 one-pixel videos": ("video", 10000, 3, 1, 0, 1, 1),
    "4,000 images of 64 tokens": ("image", 4000, 10, 1, 0, 8, 8),
    "one video of 128K tokens": ("video", 1, 20, 512, 0, 16, 16),
    "250 photos of 1,000 tokens": ("image", 250, 20, 1, 0, 25, 40),
    "3,300 photos of 300 tokens": ("image", 3300, 6, 1, 0, 15, 20),
    "one video of 1M tokens": ("video", 1, 20, 4095, 0, 16, 16),
}

LAYER_CASES = {
    f"{config}, {length}": (config, length) for config in layer_plans.CONFIGS for length in layer_plans.FRAMES
}

PROGRAM = """
import json, resource, sys, time
import torch
from sglang_mminfer import Grid, Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
try:
    from sglang_mminfer.planning.budget import PlanBudget, count_work, estimate
    from sglang_mminfer.settings import plan_budget
except ImportError:
    PlanBudget = None

(medium, count, text, frames, gap, rows, cols), chunk, repeats = json.loads(sys.argv[1])
torch.set_num_threads(1)
heads = [Grid("frame", v=True, h=True, s=True, phase=0, sink=128, local=1024)] * 4

def conversation(count):
    segments, position = [], 0
    for _ in range(count):
        segments.append(Segment(Modality.TEXT, position, position + text))
        position += text
        starts = tuple(position + i * (rows * cols + gap) for i in range(frames))
        grid = VisionGrid(frames, rows, cols, starts)
        segments.append(Segment(Modality(medium), position, starts[-1] + grid.cells, grid))
        position = segments[-1].stop
    return ModalityMap([*segments, Segment(Modality.TEXT, position, position + 5)])

def plan(chat, slots, start):
    rows = chat.length - start
    return BatchPlanner([RequestChunk(chat, start, chat.length, 0, slots)], rows, dense_below=4608).plan(heads)

def timed(work):
    processor, clock = time.thread_time(), time.perf_counter()
    result = work()
    return 1e3 * (time.thread_time() - processor), 1e3 * (time.perf_counter() - clock), result

small = conversation(2)
for start in (0, small.length - 1):  # compiles what is compiled
    plan(small, torch.arange(small.length), start)
chat = conversation(count)
start, slots = max(0, chat.length - chunk), torch.arange(chat.length)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first, _, made = timed(lambda: plan(chat, slots, start))
figures = {
    "tokens": chat.length,
    "segments": len(chat.segments),
    "first_ms": first,
    "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    "visits": int(made.block_indptr[-1]),
    "query_tiles": made.num_tiles,
}
del made
later = [timed(lambda: plan(chat, slots, start))[:2] for _ in range(repeats if first < 5e3 else 0)] or [(first, first)]
figures["plan_ms"], figures["clock_ms"] = (min(times) for times in zip(*later))
if PlanBudget is not None:
    figures["decide_ms"], _, count = timed(lambda: count_work(chat, start, chat.length, "frame"))
    figures["estimate_ms"], figures["estimate_mb"] = estimate(count)
    figures["sparse"] = PlanBudget(*plan_budget({})).allows(chat, start, chat.length, ["frame"])
print(json.dumps({name: round(value, 2) if type(value) is float else value for name, value in figures.items()}))
"""


def measure(root: Path | None, case: str, timeout_s: float, repeats: int = 5) -> dict[str, Any]:
    """Figures of one case, measured in a fresh process.

    Args:
        root: the folder that holds sglang_mminfer; None takes the installed package.
    """
    path_settings = {} if root is None else {"PYTHONPATH": str(root)}
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **path_settings}
    arguments = (
        [sys.executable, "-c", PROGRAM, json.dumps([CASES[case], CHUNK, repeats])]
        if case in CASES
        else [sys.executable, "-m", layer_plans.__name__, *LAYER_CASES[case]]
    )
    try:
        finished = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, check=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"over_s": timeout_s}
    return json.loads(finished.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mminfer.benchmarks.plan_time", description="What planning one chunk costs."
    )
    parser.add_argument("--before", metavar="REVISION", help="a git revision to compare with")
    parser.add_argument("--case", action="append", choices=(*CASES, *LAYER_CASES), help="default: all")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a case; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        roots: dict[str, Path | None] = {}
        if options.before:
            roots[f"before ({options.before})"] = unpacked(options.before, Path(scratch))
        roots["now"] = None
        for case in options.case or (*CASES, *LAYER_CASES):
            for label, root in roots.items():
                if case in LAYER_CASES and root is not None:
                    continue  # the benchmark is not among the files of that revision
                figures.setdefault(case, {})[label] = measure(root, case, options.timeout)
                print(f"{case}, {label}: {figures[case][label]}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({**machine.describe(), "chunk": CHUNK, "figures": figures}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Checks the answers of the kernel as compiled on this machine, and times one small case.

    python -m sglang_mminfer.benchmarks.smoke [--check-only]

`make test-gpu-sanitize` runs this program under compute-sanitizer.
"""

from __future__ import annotations

import sys

import torch

from sglang_mminfer.benchmarks import cases, measure
from sglang_mminfer.benchmarks.inputs import make_inputs
from sglang_mminfer.kernels.triton import launch
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.serving import self_check

SMALL = cases.Case("28/4", 32768, 8192, "a_shape")


def check(device: str, dtype: torch.dtype, thorough: bool) -> self_check.Answer:
    """Run the self-check of the Triton kernels at the benchmarks' head dim."""
    far = self_check.FAR if thorough else 0
    return self_check.check(
        launch.run, device, dtype, cases.HEAD_DIM, pool_elements=far, estimates=True, thorough=thorough
    )


def throughput() -> float:
    """TFLOP/s on the visited tiles of SMALL, in bf16."""
    heads = cases.SHAPES[SMALL.shape]
    inputs = make_inputs(SMALL.rows, SMALL.tokens, heads, cases.HEAD_DIM, torch.bfloat16, "cuda", SMALL.slots)
    chunk = RequestChunk(cases.conversation(SMALL), SMALL.tokens - SMALL.rows, SMALL.tokens, 0, inputs.slots)
    plan = BatchPlanner([chunk], SMALL.rows).plan([cases.PATTERNS[SMALL.pattern]] * heads[0])
    work = lambda: launch.run(inputs.q, inputs.k_cache, inputs.v_cache, plan, inputs.scale, inputs.out, inputs.lse)  # noqa: E731
    flop = measure.visited_pairs(plan) * 4 * cases.HEAD_DIM * heads[0]
    return flop / measure.timed(work, "cuda").ms / 1e9


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not launch.interpreted():
        print("expected a GPU, or TRITON_INTERPRET=1")
        return 2
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,):
        answer = check(device, dtype, thorough=device == "cuda" and "--check-only" not in sys.argv)
        wrong += not answer.good
        print(f"{dtype}: {answer}{'' if answer.good else ': WRONG'}")
    if device == "cuda" and "--check-only" not in sys.argv:
        print(f"{SMALL.name}: {throughput():.0f} TFLOP/s")
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())

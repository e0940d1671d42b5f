"""Does the kernel, compiled on this machine, give right answers, and how fast is one small case?

    python -m sglang_mminfer.kernels.benchmarks.smoke [--check-only]

`mminfer doctor` asks this; under compute-sanitizer (`make test-gpu-sanitize`) it is the small case.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from sglang_mminfer.kernels import reference
from sglang_mminfer.kernels.triton import launch

from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.plan import BatchPlanner, RequestChunk
from sglang_mminfer.patterns.spec import AShape, Grid, HeadPattern, QBoundary, TriShape

from . import cases, measure
from .inputs import make_inputs

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
SMALL = cases.Case("28/4", 32768, 8192, "a_shape")
SLOW = 0.8  # of what is expected
EXPECTED: dict[tuple[str, str], float] = {}
"""TFLOP/s of SMALL, by (name of the card, version of Triton without its last part). None was measured yet."""

_HEADS: list[HeadPattern] = [
    AShape(20, 70),
    Grid("frame", True, True, True, 3, 16, 64),
    TriShape(16, 64, 3),
    QBoundary({Modality.TEXT: AShape(8, 80), Modality.VIDEO: Grid("row", True, False, True, 1, 8, 30)}),
]


@dataclass(frozen=True)
class Answer:
    """Largest differences from float64, of the output and of the base-2 LSE, and whether they are small enough."""

    error: float
    lse_error: float
    repeatable: bool
    within: float

    @property
    def good(self) -> bool:
        return self.repeatable and self.error <= self.within and self.lse_error <= max(self.within, 5e-3)


def check(device: str, dtype: torch.dtype, head_dim: int = 64) -> Answer:
    """A chunk of a small conversation in a shuffled pool, full, partial and picked tiles among its visits, twice."""
    tokens, q_start, kv_heads = 420, 100, 2
    video = Segment(
        Modality.VIDEO, 90, 300, VisionGrid(5, 6, 7, (90, 132, 174, 216, 258))
    )  # ends in the middle of a tile
    chat = ModalityMap([Segment(Modality.TEXT, 0, 90), video, Segment(Modality.TEXT, 300, tokens)])
    random = torch.Generator().manual_seed(0)
    slots = torch.randperm(tokens + 50, generator=random)[:tokens]
    q = torch.randn(tokens - q_start, len(_HEADS), head_dim, generator=random).to(dtype)
    k, v = (torch.randn(tokens + 50, kv_heads, head_dim, generator=random).to(dtype) for _ in range(2))
    scale = head_dim**-0.5
    chunk = RequestChunk(chat, q_start, tokens, 0, slots)
    exact, exact_lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    reference.run(q.float(), k.float(), v.float(), BatchPlanner([chunk], len(q)).plan(_HEADS), scale, exact, exact_lse)

    chunk = RequestChunk(chat, q_start, tokens, 0, slots.to(device))
    plan = BatchPlanner([chunk], len(q)).plan(_HEADS)
    q, k, v = (x.to(device) for x in (q, k, v))
    found = []
    for _ in range(2):
        out = torch.full(q.shape, torch.nan, dtype=dtype, device=device)
        lse = torch.full(q.shape[:2], torch.nan, device=device)
        launch.run(q, k, v, plan, scale, out, lse)
        found.append((out.float().cpu(), lse.cpu()))
    (out, lse), again = found
    repeatable = torch.equal(out, again[0]) and torch.equal(lse, again[1])
    # NaN must not pass as small
    error, lse_error = (float(x.abs().nan_to_num(torch.inf).max()) for x in (out - exact, lse - exact_lse))
    return Answer(error, lse_error, repeatable, TOLERANCE[dtype])


def throughput() -> float:
    """TFLOP/s on visited tiles of SMALL, in bf16."""
    heads = cases.SHAPES[SMALL.shape]
    given = make_inputs(SMALL.rows, SMALL.tokens, heads, cases.HEAD_DIM, torch.bfloat16, "cuda", SMALL.slots)
    chunk = RequestChunk(cases.conversation(SMALL), SMALL.tokens - SMALL.rows, SMALL.tokens, 0, given.slots)
    plan = BatchPlanner([chunk], SMALL.rows).plan([cases.PATTERNS[SMALL.pattern]] * heads[0])
    work = lambda: launch.run(given.q, given.k_cache, given.v_cache, plan, given.scale, given.out, given.lse)  # noqa: E731
    flop = measure.visited_pairs(plan) * 4 * cases.HEAD_DIM * heads[0]
    return flop / measure.timed(work, "cuda").ms / 1e9


def expected(card: str, triton_version: str) -> float | None:
    """What EXPECTED has for them."""
    return EXPECTED.get((card, ".".join(triton_version.split(".")[:2])))


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not launch.interpreted():
        print("expected a GPU, or TRITON_INTERPRET=1")
        return 2
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,):
        answer = check(device, dtype)
        wrong += not answer.good
        print(f"{dtype}: {answer}{'' if answer.good else ': WRONG'}")
    if device == "cuda" and "--check-only" not in sys.argv:
        print(f"{SMALL.name}: {throughput():.0f} TFLOP/s")
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())

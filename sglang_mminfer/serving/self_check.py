"""Does an executor give right answers on this machine? Asked at start-up on a GPU, by `mminfer doctor` and by tests.

One small chunk of a conversation in a shuffled pool, with full, partial and picked tiles among its visits and two
passes, against float64. Where the executor compiles its kernels, this is when it does, not in the first request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_mminfer.kernels import reference
from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.boundary import HeadPattern, QBoundary
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.planning.planner import BatchPlanner, RequestChunk

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
LSE_TOLERANCE = 5e-3
TOKENS, Q_START, SPARE_SLOTS = 420, 100, 50
PATTERNS: tuple[HeadPattern, ...] = (
    AShape(20, 70),
    Grid("frame", True, True, True, 3, 16, 64),
    TriShape(16, 64, 3),
    QBoundary({Modality.TEXT: AShape(8, 80), Modality.VIDEO: Grid("row", True, False, True, 1, 8, 30)}),
)


@dataclass(frozen=True)
class Answer:
    """Largest differences from float64, of the output and of the base-2 LSE, and whether two runs were equal."""

    error: float
    lse_error: float
    repeatable: bool
    within: float

    @property
    def good(self) -> bool:
        return self.repeatable and self.error <= self.within and self.lse_error <= max(self.within, LSE_TOLERANCE)

    def __str__(self) -> str:
        again = "two runs are equal" if self.repeatable else "two runs differ"
        return f"largest error {self.error:.1e} (allowed: {self.within:.0e}), of the LSE {self.lse_error:.1e}, {again}"


def check(
    run: Executor,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> Answer:
    """Run the case on `device` twice. Shapes are the model's, so that what is compiled is what requests need."""
    frames = VisionGrid(5, 6, 7, tuple(range(90, 300, 42)))  # begins and ends in the middle of a tile
    chat = ModalityMap(
        [
            Segment(Modality.TEXT, 0, 90),
            Segment(Modality.VIDEO, 90, 300, frames),
            Segment(Modality.TEXT, 300, TOKENS),
        ]
    )
    random = torch.Generator().manual_seed(0)
    slots = torch.randperm(TOKENS + SPARE_SLOTS, generator=random)[:TOKENS]
    q = torch.randn(TOKENS - Q_START, num_heads, head_dim, generator=random).to(dtype)
    k, v = (torch.randn(TOKENS + SPARE_SLOTS, num_kv_heads, head_dim, generator=random).to(dtype) for _ in range(2))
    scale = head_dim**-0.5
    heads = [PATTERNS[head % len(PATTERNS)] for head in range(num_heads)]

    def planned(where: torch.device | str) -> PrefillPlan:
        chunk = RequestChunk(chat, Q_START, TOKENS, 0, slots.to(where))
        return BatchPlanner([chunk], len(q)).plan(heads)

    exact, exact_lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    reference.run(q.float(), k.float(), v.float(), planned("cpu"), scale, exact, exact_lse)
    given, plan, found = [x.to(device) for x in (q, k, v)], planned(device), []
    for _ in range(2):
        out = torch.full(q.shape, torch.nan, dtype=dtype, device=device)
        lse = torch.full(q.shape[:2], torch.nan, device=device)
        run(*given, plan, scale, out, lse)
        found.append((out.float().cpu(), lse.cpu()))
    (out, lse), again = found
    # NaN must not pass as small.
    error, lse_error = (float(x.abs().nan_to_num(torch.inf).max()) for x in (out - exact, lse - exact_lse))
    repeatable = torch.equal(out, again[0]) and torch.equal(lse, again[1])
    return Answer(error, lse_error, repeatable, TOLERANCE[dtype])

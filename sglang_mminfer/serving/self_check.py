"""Does an executor give right answers on this machine? Runs at start-up on a GPU, in `mminfer doctor` and in tests.

The case is one small chunk of a conversation in a shuffled KV pool. Its plan has two passes and visits full, partial
and gathered tiles. The answer is compared with float64. Executors that compile kernels do so here, not in the first
request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_mminfer.kernels import executors, reference
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.boundary import HeadPattern, QBoundary
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner

logger = logging.getLogger(__name__)

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
    """How far an executor is from the float64 reference.

    Attributes:
        error: the largest difference of the output.
        lse_error: the largest difference of the base-2 LSE.
        repeatable: whether two runs are bitwise equal.
        within: the largest `error` that is allowed.
    """

    error: float
    lse_error: float
    repeatable: bool
    within: float

    @property
    def good(self) -> bool:
        """Whether two runs are equal and the differences are within bounds."""
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
    """Runs the case twice on `device`.

    Args:
        run: the executor.
        dtype: of q, K and V: a key of `TOLERANCE`.
        head_dim, num_heads, num_kv_heads: the model's shapes, so that the kernels that requests need are compiled.
    """
    frames = VisionGrid(5, 6, 7, tuple(range(90, 300, 42)))  # its first and last frames begin and end inside a tile
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

    def planned(target: torch.device | str) -> BlockPlan:
        chunk = RequestChunk(chat, Q_START, TOKENS, 0, slots.to(target))
        return BatchPlanner([chunk], len(q)).plan(heads)

    exact, exact_lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    reference.run(q.float(), k.float(), v.float(), planned("cpu"), scale, exact, exact_lse)
    inputs, plan, outputs = [x.to(device) for x in (q, k, v)], planned(device), []
    for _ in range(2):
        out = torch.full(q.shape, torch.nan, dtype=dtype, device=device)
        lse = torch.full(q.shape[:2], torch.nan, device=device)
        run(*inputs, plan, scale, out, lse)
        outputs.append((out.float().cpu(), lse.cpu()))
    (out, lse), second = outputs
    # A NaN must not pass as a small difference.
    error, lse_error = (float(x.abs().nan_to_num(torch.inf).max()) for x in (out - exact, lse - exact_lse))
    repeatable = torch.equal(out, second[0]) and torch.equal(lse, second[1])
    return Answer(error, lse_error, repeatable, TOLERANCE[dtype])


def first_fit(
    runner: Any, names: Sequence[str], device: torch.device, ranks: int, dense_backend: str
) -> tuple[str, str | None]:
    """The first of these executors that gives right answers here, and None.

    If none does: the last of them, and the dense_reason of every request. Arguments as for `why_unfit`.
    """
    for name, following in zip(names, [*names[1:], None]):
        otherwise = "everything runs dense" if following is None else f"{following} is tried next"
        reason = why_unfit(runner, name, device, ranks, dense_backend, otherwise)
        if reason != "executor_failed":
            break
        executors.ruled_out.add(name)
    return name, reason


def why_unfit(
    runner: Any,
    executor: str,
    device: torch.device,
    ranks: int,
    dense_backend: str,
    otherwise: str = "everything runs dense",
) -> str | None:
    """Runs the case through the executor before the first request.

    Args:
        runner: SGLang's model runner; the case has its shapes.
        executor: a name in `executors.EXECUTORS`.
        device: where requests run. Nothing is checked on a CPU.
        ranks: tensor-parallel ranks of the attention.
        dense_backend: the backend that runs everything if the check fails; for the log.
        otherwise: what follows if the check fails; for the log.

    Returns:
        The dense_reason of every request if the check fails, else None.
    """
    kv_dtype, model_dtype = getattr(runner, "kv_cache_dtype", None), getattr(runner, "dtype", None)
    if kv_dtype is not None and model_dtype is not None and kv_dtype != model_dtype:
        logger.warning(
            "mminfer: the KV cache stores %s and attention computes in %s, so every request runs dense, on %s. A "
            "checkpoint may ask for that; --kv-cache-dtype bfloat16 keeps the cache as wide as the model.",
            kv_dtype,
            model_dtype,
            dense_backend,
        )
        return "kv_cache_dtype"
    if device.type == "cpu":
        return None
    model = runner.model_config
    heads = model.num_attention_heads // ranks, model.get_num_kv_heads(ranks)
    try:
        answer = check(executors.EXECUTORS[executor], device, runner.dtype, model.head_dim, *heads)
    except Exception:
        logger.exception("mminfer: the %s executor does not run here; %s", executor, otherwise)
        return "executor_failed"
    if answer.good:
        logger.info("mminfer: the %s executor was checked on %s: %s", executor, device, answer)
        return None
    logger.error("mminfer: the %s executor is wrong here (%s); %s", executor, answer, otherwise)
    return "executor_failed"

"""Does an executor give right answers on this machine? Runs at start-up on a GPU, in `mminfer doctor` and in tests.

There are three cases, each in a shuffled KV pool: a small chunk of a conversation, whose plan has two passes and visits
full, partial and gathered tiles; a few rows that see thousands of keys, in a pool as large as the server's; and the
estimate of vertical_slash, if the config has an estimated pattern. Every answer is compared with one in higher
precision, and must be the same each time: some compilers leave out what orders a kernel's copies and its products, and
then a kernel is right most of the time. Executors that compile kernels do so here, not in the first request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_mminfer.kernels import executors, reference
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.kernels.rows import dense_rows
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.boundary import HeadPattern, QBoundary
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.patterns.vertical_slash import masses_of
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner

logger = logging.getLogger(__name__)

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
LSE_TOLERANCE = 5e-3
TOKENS, Q_START, SPARE_SLOTS = 420, 100, 50
LONG, LONG_ROWS = 12_000, 64
"""Tokens of the prompt with long lists of tiles, and its rows."""

REPEATS = 20
"""How often each case runs on a GPU."""

FAR = (1 << 31) + (1 << 26)
"""Elements of a pool some of whose offsets do not fit into 31 bits."""

PATTERNS: tuple[HeadPattern, ...] = (
    AShape(20, 70),
    Grid("frame", True, True, True, 3, 16, 64),
    TriShape(16, 64, 3),
    QBoundary({Modality.TEXT: AShape(8, 80), Modality.VIDEO: Grid("row", True, False, True, 1, 8, 30)}),
)


@dataclass(frozen=True)
class Answer:
    """How far answers are from those in higher precision.

    Attributes:
        error: the largest difference of the output.
        lse_error: the largest difference of the base-2 LSE.
        repeatable: whether all runs are bitwise equal.
        within: the largest `error` that is allowed.
        runs: how often each case ran.
    """

    error: float
    lse_error: float
    repeatable: bool
    within: float
    runs: int

    @property
    def good(self) -> bool:
        """Whether all runs are equal and the differences are within bounds."""
        return self.repeatable and self.error <= self.within and self.lse_error <= max(self.within, LSE_TOLERANCE)

    def joined(self, other: Answer) -> Answer:
        """The worse of both."""
        return Answer(
            max(self.error, other.error),
            max(self.lse_error, other.lse_error),
            self.repeatable and other.repeatable,
            self.within,
            self.runs,
        )

    def __str__(self) -> str:
        again = f"{self.runs} runs {'are equal' if self.repeatable else 'differ'}"
        return f"largest error {self.error:.1e} (allowed: {self.within:.0e}), of the LSE {self.lse_error:.1e}, {again}"


@dataclass(frozen=True)
class _Shapes:
    """What the cases have in common: where they run, and the model's shapes."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    runs: int
    kv_dtype: torch.dtype

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def random(self, random: torch.Generator, *shape: int) -> torch.Tensor:
        """[*shape, head_dim] on the host."""
        return torch.randn(*shape, self.head_dim, generator=random).to(self.dtype)

    def random_kv(self, random: torch.Generator, *shape: int) -> torch.Tensor:
        """[*shape, head_dim] on the host, keys or values as the pool stores them."""
        return self.random(random, *shape).to(self.kv_dtype)

    def compare(
        self, run: Callable[[], tuple[torch.Tensor, torch.Tensor]], exact: torch.Tensor, exact_other: torch.Tensor
    ) -> Answer:
        """Runs a case, and compares what it gives with `exact` and `exact_other`, on any device."""
        out, other = run()
        again = (run() for _ in range(self.runs - 1))
        repeatable = all(torch.equal(out, o) and torch.equal(other, s) for o, s in again)
        # A NaN must not pass as a small difference.
        error, other_error = (
            float((got.float().cpu() - expected.cpu()).abs().nan_to_num(torch.inf).max())
            for got, expected in ((out, exact), (other, exact_other))
        )
        return Answer(error, other_error, repeatable, TOLERANCE[self.dtype], self.runs)

    def attention(
        self, run: Executor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """A run of the executor over poisoned outputs."""

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            out = torch.full(q.shape, torch.nan, dtype=self.dtype, device=self.device)
            lse = torch.full(q.shape[:2], torch.nan, device=self.device)
            run(q, k, v, plan, self.scale, out, lse)
            return out, lse

        return once


def check(
    run: Executor,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    *,
    kv_dtype: torch.dtype | None = None,
    pool_elements: int = 0,
    estimates: bool = False,
    thorough: bool | None = None,
) -> Answer:
    """Runs the cases on `device`.

    Args:
        run: the executor.
        dtype: of q: a key of `TOLERANCE`. kv_dtype: of K and V in the pool; None: that of q.
        head_dim, num_heads, num_kv_heads: the model's shapes, so that the kernels that requests need are compiled.
        pool_elements: elements of one layer's keys in the pool. The pool of the long case has as many if the GPU has
            the memory, or `FAR` if those are fewer.
        estimates: whether to run the kernels of estimated patterns, which need a GPU or Triton's interpreter.
        thorough: run each case `REPEATS` times, and one with long lists; None: on a GPU. Elsewhere that takes long.
    """
    device = torch.device(device)
    thorough = device.type == "cuda" if thorough is None else thorough
    runs = REPEATS if thorough else 2
    shapes = _Shapes(device, dtype, head_dim, num_heads, num_kv_heads, runs, kv_dtype or dtype)
    answer = _check_chunk(run, shapes)
    answer = answer.joined(_check_long_lists(run, shapes, LONG if thorough else LONG // 25, pool_elements))
    return answer.joined(_check_estimate(shapes)) if estimates else answer


def _check_chunk(run: Executor, shapes: _Shapes) -> Answer:
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
    q = shapes.random(random, TOKENS - Q_START, shapes.num_heads)
    k, v = (shapes.random_kv(random, TOKENS + SPARE_SLOTS, shapes.num_kv_heads) for _ in range(2))
    heads = [PATTERNS[head % len(PATTERNS)] for head in range(shapes.num_heads)]

    def planned(target: torch.device | str) -> BlockPlan:
        chunk = RequestChunk(chat, Q_START, TOKENS, 0, slots.to(target))
        return BatchPlanner([chunk], len(q)).plan(heads)

    exact, exact_lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    reference.run(q.float(), k.float(), v.float(), planned("cpu"), shapes.scale, exact, exact_lse)
    inputs = [x.to(shapes.device) for x in (q, k, v)]
    return shapes.compare(
        shapes.attention(run, inputs[0], inputs[1], inputs[2], planned(shapes.device)), exact, exact_lse
    )


def compile_ahead() -> None:
    """Compile the loops of planning, or load them: the first process of a machine takes seconds for it, which no
    request should wait for."""
    grid = VisionGrid(2, 2, 2, (1, 5))
    chat = ModalityMap(
        [Segment(Modality.TEXT, 0, 1), Segment(Modality.VIDEO, 1, 9, grid), Segment(Modality.TEXT, 9, 10)]
    )
    head = Grid("frame", v=True, h=True, s=True, phase=0, sink=0, local=1)
    planner = BatchPlanner([RequestChunk(chat, 0, 10, 0, torch.arange(10))], 10, block_q=4, block_k=2)
    planner.plan([head, Adaptive(sink=0, local=1, rank=1, alpha=1.0)], *torch.zeros(2, 10, 2, 8))


def _check_long_lists(run: Executor, shapes: _Shapes, tokens: int, pool_elements: int) -> Answer:
    """The last rows of a prompt that see all of it, at the far end of a pool."""
    random, rows, device = torch.Generator().manual_seed(1), min(LONG_ROWS, tokens), shapes.device
    width = 2 * shapes.num_kv_heads * shapes.head_dim  # K and V lie side by side, so a pool of FAR elements is enough
    num_slots = tokens + SPARE_SLOTS
    if device.type == "cuda":
        wished = max(min(pool_elements, FAR) // width, num_slots)
        free, _ = torch.cuda.mem_get_info(device)
        num_slots = wished if 2 * wished * width * shapes.kv_dtype.itemsize < free else num_slots
    pool = torch.empty(num_slots, 2, shapes.num_kv_heads, shapes.head_dim, dtype=shapes.kv_dtype, device=device)
    slots = num_slots - 1 - torch.randperm(tokens + SPARE_SLOTS, generator=random)[:tokens]
    slots = slots.to(device)
    pool[slots] = shapes.random_kv(random, tokens, 2, shapes.num_kv_heads).to(device)
    # Four times as large, so that a row's answer is that of a few keys: the mean over thousands would be about 0.
    q = 4 * shapes.random(random, rows, shapes.num_heads).to(device)
    k, v = pool.unbind(1)
    chat = ModalityMap([Segment(Modality.TEXT, 0, tokens)])
    plan = BatchPlanner([RequestChunk(chat, tokens - rows, tokens, 0, slots)], rows).plan([Dense()] * shapes.num_heads)
    positions = torch.arange(tokens - rows, tokens, device=device)
    exact, exact_lse = dense_rows(q, positions, k, v, slots, shapes.scale)
    answer = shapes.compare(shapes.attention(run, q, k, v, plan), exact, exact_lse)
    del pool, k, v
    if device.type == "cuda":
        torch.cuda.empty_cache()  # SGLang has other plans for this memory
    return answer


def _check_estimate(shapes: _Shapes) -> Answer:
    """The masses of columns and diagonals that vertical_slash picks from; with the last rows of a chunk."""
    from sglang_mminfer.kernels.triton.estimate import BLOCK, estimate

    random, device = torch.Generator().manual_seed(2), shapes.device
    q, k = shapes.random(random, BLOCK, shapes.num_heads), shapes.random_kv(random, TOKENS, shapes.num_kv_heads)
    slots = torch.randperm(TOKENS + SPARE_SLOTS, generator=random)[:TOKENS].to(device)
    pool = torch.full((TOKENS + SPARE_SLOTS, *k.shape[1:]), torch.nan, device=device).to(shapes.kv_dtype)
    pool[slots] = k.to(device)
    positions, heads = torch.arange(TOKENS - BLOCK, TOKENS), list(range(shapes.num_heads))
    exact = masses_of(q.float(), k.float(), heads, positions, (positions + 1).tolist(), shapes.scale)
    mean = TOKENS / BLOCK  # the weights of a row sum to 1; so the mean of what is compared is 1
    on_device, numbers = q.to(device), torch.tensor(heads, dtype=torch.int32, device=device)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        found = estimate(on_device, pool, slots.int(), numbers, TOKENS - BLOCK + 1, shapes.scale)
        return found[0] * mean, found[1] * mean

    return shapes.compare(once, exact[0] * mean, exact[1] * mean)


def first_fit(
    runner: Any,
    names: Sequence[str],
    device: torch.device,
    ranks: int,
    dense_backend: str,
    estimates: bool = False,
) -> tuple[str, str | None]:
    """The first of these executors that gives right answers here, and None.

    If none does: the last of them, and the dense_reason of every request. Arguments as for `why_unfit`.
    """
    for name, following in zip(names, [*names[1:], None]):
        otherwise = "everything runs dense" if following is None else f"{following} is tried next"
        reason = why_unfit(runner, name, device, ranks, dense_backend, otherwise, estimates)
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
    estimates: bool = False,
) -> str | None:
    """Runs the cases through the executor before the first request.

    Args:
        runner: SGLang's model runner; the cases have its shapes.
        executor: a name in `executors.EXECUTORS`.
        device: where requests run. Nothing is checked on a CPU.
        ranks: tensor-parallel ranks of the attention.
        dense_backend: the backend that runs everything if the check fails; for the log.
        otherwise: what follows if the check fails; for the log.
        estimates: whether the head config has an estimated pattern.

    Returns:
        The dense_reason of every request if the check fails, else None.
    """
    kv_dtype = getattr(runner, "kv_cache_dtype", None) or runner.dtype
    if (why := executors.why_unread(kv_dtype, device)) is not None:
        logger.warning(
            "mminfer: the KV cache stores %s, which no executor reads here (%s), so every request runs dense, on %s. A "
            "checkpoint may ask for that; --kv-cache-dtype bfloat16 keeps the cache as wide as the model.",
            kv_dtype,
            why,
            dense_backend,
        )
        return "kv_cache_dtype"
    if device.type == "cpu":
        return None
    model = runner.model_config
    heads = model.num_attention_heads // ranks, model.get_num_kv_heads(ranks)
    try:
        first_layer = getattr(runner, "start_layer", None) or 0
        answer = check(
            executors.EXECUTORS[executor],
            device,
            runner.dtype,
            model.head_dim,
            *heads,
            kv_dtype=kv_dtype,
            pool_elements=runner.token_to_kv_pool.get_key_buffer(first_layer).numel(),
            estimates=estimates,
        )
    except Exception:
        logger.exception("mminfer: the %s executor does not run here; %s", executor, otherwise)
        return "executor_failed"
    if answer.good:
        logger.info("mminfer: the %s executor was checked on %s (%s): %s", executor, device, compilers(device), answer)
        return None
    logger.error("mminfer: the %s executor is wrong here (%s; %s); %s", executor, answer, compilers(device), otherwise)
    return "executor_failed"


def compilers(device: torch.device) -> str:
    """The versions of Triton and of the assembler that it uses for this GPU: kernels differ with them."""
    try:
        import triton
        from triton import knobs

        blackwell = torch.cuda.get_device_capability(device)[0] >= 10
        assembler = knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas
        return f"triton {triton.__version__}, ptxas {assembler.version}"
    except Exception as error:  # the log says what it can
        return f"compilers unknown: {error}"

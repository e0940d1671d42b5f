"""How often Triton compiles a kernel while a server runs: once for all chunks. Counted without a GPU.

In the place of a launch, Triton's own binder says by what it would look for a compiled kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import KernelInterface, create_function_from_signature

from sglang_mminfer.kernels.triton import estimate, launch, low_rank_scan, picked_keys
from sglang_mminfer.kernels.triton.low_rank_scan import ScannedTiles
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import INTERPRETED, conversation

Builds = dict[tuple[str, int | None], set[str]]
"""By kernel, and by the number of a plan's passes where that is a constant of the kernel."""

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    """What Triton's cache would hold after all launches of a test on an sm_90."""
    backend, found = make_backend(GPUTarget("cuda", 90, 32)), Builds()

    def launched(kernel: Any, grid: Any) -> Any:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def look(*args: Any, **kwargs: Any) -> None:
            _, specialization, options = bind(*args, **kwargs)
            name = kernel.fn.__name__, kwargs.get("PASSES")
            found.setdefault(name, set()).add(f"{specialization} {options}")

        return look

    monkeypatch.setattr(KernelInterface, "__getitem__", launched)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return found


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def test_the_estimate_is_compiled_once(builds: Builds) -> None:
    k = bf16(5000, 2, 128)
    for rows, keys, heads in ((64, 64, 14), (1, 1, 1), (64, 4096, 3), (17, 333, 14), (16, 16, 2), (64, 5000, 5)):
        slots, numbers = torch.arange(keys, dtype=torch.int32), torch.arange(heads, dtype=torch.int32)
        for some in numbers.split(11):  # as where the masses of all heads would be too large
            estimate.estimate(bf16(rows, 14, 128), k, slots, some, keys - rows + 1, 0.1)
    assert {name: len(found) for (name, _), found in builds.items()} == {"row_lse": 1, "masses": 1}


def test_the_choice_is_compiled_once_for_all_chunks(builds: Builds) -> None:
    """But for heads that share their keys and for those that do not; wherever arrays begin."""
    k, basis = bf16(5000, 2, 128), (torch.zeros(2, 16, 128), torch.zeros(2, 16, 128))
    shared, own = [(0, 0), (1, 1)], [range(7), range(7, 14)]
    for rows, keys, at, forms, heads in (
        ((64,) * 8, 4096, 0, shared, own),
        ((1,), 1700, 3, shared, own),
        ((16, 64, 16), 333, 1, shared[1:], [[8]]),
        ((5,), 16, 2, shared, [[0], [7, 9]]),
    ):
        slots = torch.zeros(keys + at, dtype=torch.int32)[at:]
        low = low_rank_scan.project_keys(k, slots, forms, basis[1], 8)
        count, q = np.array(rows), bf16(sum(rows), 14, 128)
        between = count * 0 + max(keys - 64 - sum(rows), 0)
        tiles = ScannedTiles(count.cumsum() - count, count, between, between + count, count * 0 + 16, between, between)
        numbers = torch.zeros(len(q) + at, dtype=torch.int64)[at:], torch.zeros(len(q) + at, dtype=torch.int32)[at:]
        asked = low_rank_scan.scan(q, k, slots, low, forms, heads, basis, 8, *numbers, tiles, 16, 64, 0.1, -4.6)
        first = torch.zeros(asked.counts.shape[:2], dtype=torch.int64)
        lanes = torch.zeros(64 * at + 64, dtype=torch.int32)
        low_rank_scan.side_by_side(asked, first, first == 0, lanes)
        picked_keys.with_picked(slots, slots, lanes, at, 64, 1 << 30)
    names = ("low_rank_keys", "low_rank_queries", "asked_side_by_side", "picked_keys")
    expected = dict.fromkeys(names, 1) | {"any_row_above": 2}
    assert {name: len(found) for (name, _), found in builds.items()} == expected


def test_attention_is_compiled_once_for_all_chunks(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    grid: HeadPattern = Grid("frame", True, True, True, 3, 16, 64)
    chat = conversation(40, (30, 6, 7), 50, (1, 6, 7), 301)
    q, k = bf16(chat.length, 14, 128), bf16(chat.length, 2, 128)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    for start, stop in ((0, chat.length), (500, 501), (500, 508), (500, 565), (1200, 1331)):
        slots = torch.arange(stop)
        for heads in ([grid] * 14, [AShape(16, 64)] * 14, [TriShape(16, 64, 0), *[grid] * 13]):
            plan = BatchPlanner([RequestChunk(chat, start, stop, 0, slots)], stop - start).plan(heads)
            rows = q[: stop - start]
            launch.run(rows, k, k, plan, 0.1, torch.empty_like(rows), torch.empty(rows.shape[:2]))
    assert {name for name, _ in builds} == {"tile_attention", "merge_slots"}
    assert {len(found) for found in builds.values()} == {1}

"""How often Triton compiles a kernel while a server runs: once for all chunks. Counted without a GPU.

In the place of a launch, Triton's own binder says by what it would look for a compiled kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import KernelInterface, create_function_from_signature

from sglang_mminfer.kernels.triton import estimate, launch
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
        estimate.estimate(bf16(rows, 14, 128), k, slots, numbers, keys - rows + 1, 0.1)
    assert {name: len(found) for (name, _), found in builds.items()} == {"row_lse": 1, "masses": 1}


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

"""What the plans of all layers cost the host: the last chunk of one video, in this process.

    python -m sglang_mminfer.benchmarks.layer_plans CONFIG LENGTH

`plan_time` runs it for each case in a process of its own. All times are processor time of one thread, the least of
several rounds, because a busy machine only adds to them:

    prepare_ms         what needs no device (`BatchPlanner.prepare`); a server does it on a thread
    first_prepare_ms   the same for the first chunk of a request, which also reads the map
    launch_ms          assembling: what Python and the launches of torch operations cost, measured with an early chunk
                       of few rows, whose tensors are so small that the operations cost next to nothing themselves
    host_ms            prepare_ms + launch_ms
    cpu_plan_ms        uploading and assembling the last chunk on a CPU, which computes what a GPU would
    operations         torch operations, views apart
    kept_mb, layer_mb  what is on the device for all layers together, and what the largest plan of a layer adds
    kv_share           both, as a share of the keys and values of all layers (4 heads of 128 in bf16)
    calibration_ms     a million additions in Python, which tell how fast the machine was
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_mminfer.benchmarks.searched import HEADS, LAYERS, searched_config
from sglang_mminfer.head_config.config import HeadConfig
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.serving.self_check import compile_ahead

FRAMES = {"128K": 512, "1M": 4095}
"""Of 16 x 16 tokens."""

CHUNK, FEW_ROWS, ROUNDS, DENSE_BELOW = 8192, 128, 9, 4608
KV_BYTES = LAYERS * 2 * 4 * 128 * 2

Layers = Sequence[Sequence[HeadPattern | None]]


CONFIGS: dict[str, Callable[[ModalityMap], Layers]] = {
    "one grid": lambda chat: [[Grid("row", True, True, True, 3, 64, 1024)] * HEADS] * LAYERS,
    "grid_static": lambda chat: [HeadConfig.load("grid_static").patterns(layer, HEADS) for layer in range(LAYERS)],
    "searched config": searched_config,
}


def video(frames: int) -> ModalityMap:
    """A line of text, one video, and a question."""
    starts = tuple(range(20, 20 + 256 * frames, 256))
    stop = starts[-1] + 256
    return ModalityMap(
        [
            Segment(Modality.TEXT, 0, 20),
            Segment(Modality.VIDEO, 20, stop, VisionGrid(frames, 16, 16, starts)),
            Segment(Modality.TEXT, stop, stop + 5),
        ]
    )


class _Operations(TorchDispatchMode):
    """Counts torch operations, views apart."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _milliseconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - start)


def _planned(planner: BatchPlanner, layers: Layers) -> BlockPlan:
    """The plan of a layer with the longest lists."""
    return max((planner.plan(heads) for heads in layers), key=lambda plan: len(plan.block_indices))


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in {t.data_ptr(): t for t in tensors}.values())


def measure(config: str, length: str) -> dict[str, float | int]:
    """Figures of one case."""
    torch.set_num_threads(1)
    compile_ahead()
    chat = video(FRAMES[length])
    layers = list(dict.fromkeys(map(tuple, CONFIGS[config](chat))))  # layers with the same heads share a plan
    patterns = [set(heads) for heads in layers]
    slots = torch.arange(chat.length)

    def planner(start: int, stop: int) -> BatchPlanner:
        chunk = RequestChunk(chat, start, stop, 0, slots[:stop])
        return BatchPlanner([chunk], stop - start, dense_below=DENSE_BELOW, keep=False)

    def prepare() -> float:
        fresh = planner(chat.length - CHUNK, chat.length)
        return _milliseconds(lambda: fresh.prepare(layers))

    def plan() -> float:
        fresh = planner(chat.length - CHUNK, chat.length)
        fresh.prepare(layers)
        return _milliseconds(lambda: _planned(fresh, layers))

    first = prepare()
    gc.freeze()  # as a server that has started does; else each round would walk all of torch
    prepare_ms = min(prepare() for _ in range(ROUNDS))
    cpu_plan_ms = min(plan() for _ in range(ROUNDS // 3))
    small = planner(DENSE_BELOW, DENSE_BELOW + FEW_ROWS)
    launch_ms = min(_milliseconds(lambda: _planned(small, layers)) for _ in range(ROUNDS))
    whole = planner(chat.length - CHUNK, chat.length)
    whole.prepare(layers)
    with _Operations() as operations:
        largest = _planned(whole, layers)
    keys = _bytes(largest.keys.kv_pos, largest.keys.kv_slots)
    own = _bytes(*(x for x in vars(largest).values() if isinstance(x, torch.Tensor)))
    kept = keys + whole.uploaded_bytes
    return {
        "tokens": chat.length,
        "patterns": len(set.union(*patterns)),
        "patterns_of_a_layer": round(sum(map(len, patterns)) / len(layers), 1),
        "prepare_ms": prepare_ms,
        "first_prepare_ms": first,
        "launch_ms": launch_ms,
        "host_ms": prepare_ms + launch_ms,
        "cpu_plan_ms": cpu_plan_ms,
        "operations": operations.count,
        "kept_mb": kept / 1e6,
        "layer_mb": own / 1e6,
        "kv_share": (kept + own) / (KV_BYTES * chat.length),
        "calibration_ms": min(_milliseconds(lambda: sum(i for i in range(1_000_000))) for _ in range(5)),
    }


if __name__ == "__main__":
    figures = measure(*sys.argv[1:])
    print(json.dumps({name: round(x, 5 if name == "kv_share" else 2) for name, x in figures.items()}))

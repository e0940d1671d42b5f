"""Prefill of long videos in a language model of Qwen2.5-VL-7B's shape: mminfer against dense, in one run.

    python -m sglang_mminfer.benchmarks.model_prefill [--executor fa4] [--tokens 131072 1048576] [--out FILE]

The model is written in plain torch and is not served by SGLang: RMSNorm, QKV with bias, rotary embedding at the
m-RoPE positions of a video, grouped-query attention over a pool of K and V, SwiGLU MLP; bf16, random weights of its own
for every layer. A prompt is one video between two short texts. It is prefilled in chunks, each through all layers.

* Dense is cuDNN's attention (`benchmarks/rivals.py`) over a pool in the order of the prompt, so it needs no page
  table. mminfer is an executor over a shuffled pool of page size 1. The plans of all 28 layers are made before each
  chunk, and the host's time for them is counted in full, although a server makes them while the device works.
* Long prompts run fewer layers than 28, because 28 dense layers take minutes. All layers have the same shape, so
  times are scaled by 28 over the number of layers that ran. Planning is not scaled.
* When time is up, the run stops after the chunk; the length's other configs are measured by the next run.
* These costs are left out of dense's time: cuDNN builds a graph for every new length, and may need KV heads repeated,
  which a server's kernel would not do; and the two dense calls of a chunk must be joined, which a kernel with a
  bottom-right mask does inside.
* Norms, rotation and activation are separate kernels here, so the linear part is slower than a server's, on both
  sides alike. This makes the total speed-up smaller, not larger.
* Random weights say nothing about which keys matter. So all patterns are static and set by hand; none is estimated.
* Not measured: embedding, the last row's logits, sampling, the scheduler. The vision tower is measured separately, on
  some frames, and scaled by the number of frames, because its attention stays within a frame.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from sglang_mminfer.benchmarks import measure
from sglang_mminfer.benchmarks import rivals as baselines
from sglang_mminfer.benchmarks.cases import GRID_STATIC, PATTERNS, SEARCHED, searched_layers, video_map
from sglang_mminfer.benchmarks.inputs import Inputs
from sglang_mminfer.benchmarks.vision_tower import VisionShape, vision
from sglang_mminfer.kernels import executors
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.tools import machine

LAYERS = 28
MEASURED_LAYERS = {131072: 28, 262144: 28, 524288: 8, 1048576: 4}  # so that all lengths take about five minutes
CHUNK = 8192
DENSE_BELOW = 4608  # rows at lower positions see everything, as in head_configs/grid_static.json

Timed = Callable[[str], AbstractContextManager[None]]
AttendStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of the language model; the defaults are those of Qwen2.5-VL-7B."""

    hidden: int = 3584
    intermediate: int = 18944
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    theta: float = 1e6
    mrope: tuple[int, int, int] = (16, 24, 24)  # how many frequencies belong to time, row and column


CONFIGS = {"grid_static": GRID_STATIC, "searched": SEARCHED}
"""What mminfer runs: the pattern of head_configs/grid_static.json in every head; or a pattern for each head and
layer."""


def heads_of(config: str, modality_map: ModalityMap, heads: int) -> list[tuple[HeadPattern, ...]]:
    """[layers][heads]: the patterns of a config in CONFIGS; the layers of a longer model begin again with the first."""
    if CONFIGS[config] == SEARCHED:
        return searched_layers(modality_map, heads)
    return [(PATTERNS[CONFIGS[config]],) * heads]


class OutOfTime(Exception):
    """The deadline of a run has passed."""


# ---- the language model --------------------------------------------------------------------------------------


class Attention(Protocol):
    """How layers attend, over a pool whose order the implementation chooses."""

    slots: torch.Tensor  # int64 [tokens]: the pool's row of every position

    def begin_chunk(self, start: int, stop: int) -> None:
        """Get ready for every layer to run the rows [start, stop) next, in order."""

    def run(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, timed: Timed) -> torch.Tensor:
        """The next layer: q [rows, Hq, D], pools [tokens, Hkv, D] with the chunk's keys in them -> [rows, Hq, D].

        Inside `timed("attention")` time counts; inside `timed("left out")` runs what a server would not need.
        """


class DenseAttention:
    """Plain causal attention over all keys so far."""

    def __init__(self, tokens: int, device: str) -> None:
        self.slots = torch.arange(tokens, device=device)
        self._stop = 0

    def begin_chunk(self, start: int, stop: int) -> None:
        self._stop = stop

    def run(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, timed: Timed) -> torch.Tensor:
        keys, values = k_pool[: self._stop], v_pool[: self._stop]
        unused = torch.empty(0, device=q.device)
        with timed("left out"):
            dense = baselines.dense(Inputs(q, keys, values, keys, values, self.slots, unused, unused))
        with timed("attention"):
            parts = dense.run()
        with timed("left out"):
            return dense.joined(parts)


class SparseAttention:
    """An executor over a shuffled pool. The plans of `planned_layers` layers are made when a chunk begins.

    heads: [layers][heads]; the layers after the last begin again with the first.
    """

    def __init__(
        self,
        modality_map: ModalityMap,
        heads: Sequence[Sequence[HeadPattern]],
        executor: str,
        device: str,
        dense_below: int,
        planned_layers: int = LAYERS,
    ) -> None:
        tokens = modality_map.length
        self.slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).to(device)
        self._map, self._dense_below = modality_map, dense_below
        self._heads = [heads[layer % len(heads)] for layer in range(planned_layers)]
        self._run = executors.EXECUTORS[executor]
        self._plans: Iterator[BlockPlan] = iter(())

    def begin_chunk(self, start: int, stop: int) -> None:
        chunk = RequestChunk(self._map, start, stop, 0, self.slots[:stop])
        planner = BatchPlanner([chunk], stop - start, dense_below=self._dense_below)
        self._plans = iter([planner.plan(heads) for heads in self._heads])

    def run(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, timed: Timed) -> torch.Tensor:
        plan = next(self._plans)
        with timed("attention"):
            out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            self._run(q, k_pool, v_pool, plan, q.shape[2] ** -0.5, out, lse)
        return out


class Layer:
    """One decoder layer with random weights. It writes K and V to `k_pool` and `v_pool`, [tokens, Hkv, D]."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, device: str, random: torch.Generator) -> None:
        self.shape = shape
        kv_width, q_width = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim

        def weight(*size: int) -> torch.Tensor:
            values = torch.randn(*size, generator=random, device=device, dtype=torch.float32)
            return (values * shape.hidden**-0.5).to(dtype)

        self.norms = [torch.ones(shape.hidden, device=device, dtype=dtype) for _ in range(2)]
        self.qkv, self.qkv_bias = weight(q_width + 2 * kv_width, shape.hidden), weight(q_width + 2 * kv_width)
        self.o = weight(shape.hidden, q_width)
        self.gate_up = weight(2 * shape.intermediate, shape.hidden)
        self.down = weight(shape.hidden, shape.intermediate)
        self.k_pool = torch.empty(tokens, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
        self.v_pool = torch.empty_like(self.k_pool)

    def run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, attend: AttendStep
    ) -> torch.Tensor:
        """x [rows, hidden] -> [rows, hidden]; cos and sin [rows, 1, D / 2]; slots [rows]."""
        rows, shape = len(x), self.shape
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        qkv = F.linear(F.rms_norm(x, x.shape[1:], self.norms[0], 1e-6), self.qkv, self.qkv_bias)
        q, k, v = (part.view(rows, -1, shape.head_dim) for part in qkv.split([q_width, kv_width, kv_width], dim=1))
        self.k_pool[slots], self.v_pool[slots] = rotated(k, cos, sin), v
        x = x + F.linear(attend(rotated(q, cos, sin), self.k_pool, self.v_pool).reshape(rows, -1), self.o)
        gate, up = F.linear(F.rms_norm(x, x.shape[1:], self.norms[1], 1e-6), self.gate_up).chunk(2, dim=1)
        return x + F.linear(F.silu(gate) * up, self.down)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)


def mrope(modality_map: ModalityMap, shape: Shape, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """cos and sin, [tokens, 1, D / 2] each, at the m-RoPE position of every token of a map of text and videos."""
    positions = torch.empty(3, modality_map.length, dtype=torch.int64, device=device)
    position = 0
    for segment in modality_map.segments:
        grid, span = segment.grid, slice(segment.start, segment.stop)
        if segment.modality is Modality.TEXT or grid is None:
            positions[:, span] = position + torch.arange(segment.stop - segment.start, device=device)
        else:
            axes = (torch.arange(size, device=device) for size in (grid.frames, grid.rows, grid.cols))
            positions[:, span] = position + torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])
        position = int(positions[:, span].max()) + 1
    frequency = shape.theta ** (
        -torch.arange(0, shape.head_dim, 2, dtype=torch.float64, device=device) / shape.head_dim
    )
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(shape.mrope))
    angles = positions[axis].T.double() * frequency
    return tuple(function(angles).to(dtype)[:, None] for function in (torch.cos, torch.sin))


# ---- measuring -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Times named stretches of work, on the device, or on the host if there is no device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._stretches: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._stretches.append((name, begin, self._now()))

    def _now(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait_for_all_but(self, last: int) -> None:
        """Wait until the device has ended all stretches but the last ones."""
        if self._device == "cuda" and len(self._stretches) > last:
            self._stretches[-last - 1][2].synchronize()

    def seconds(self) -> dict[str, float]:
        """The total time of each name. Waits for the device."""
        measure.wait(self._device)
        totals: dict[str, float] = {}
        for name, begin, end in self._stretches:
            took = end - begin if self._device == "cpu" else begin.elapsed_time(end) / 1e3
            totals[name] = totals.get(name, 0.0) + took
        return totals


@dataclass(frozen=True)
class Prefill:
    """Seconds of one prefill.

    layers:    how many layers ran.
    attention: attention of these layers, without planning.
    linear:    everything else in these layers.
    planning:  what the host takes for the plans of all chunks.
    hidden:    [rows, hidden], the output of the last chunk.
    """

    layers: int
    attention: float
    linear: float
    planning: float
    hidden: torch.Tensor

    def scaled(self, layers: int, planning: bool) -> dict[str, float]:
        """Seconds of `layers` layers, rounded. With `planning`, that counts, too, once for all layers."""
        parts = {name: getattr(self, name) * layers / self.layers for name in ("attention", "linear")}
        if planning:
            parts["planning"] = self.planning
        return {name: round(value, 4) for name, value in {**parts, "total": sum(parts.values())}.items()}


def prefill(
    layers: Sequence[Layer],
    embeddings: Callable[[int, int], torch.Tensor],
    angles: tuple[torch.Tensor, ...],
    attention: Attention,
    chunk: int,
    device: str,
    deadline: float = math.inf,
) -> Prefill:
    """Run a prompt through the layers, `chunk` rows at a time.

    Args:
        embeddings: (start, stop) -> [stop - start, hidden]. angles: cos and sin of all tokens.
        deadline: on the clock of `time.monotonic`.

    Raises:
        OutOfTime: the deadline has passed.
    """
    watch, tokens, hidden, planning = Stopwatch(device), len(angles[0]), torch.empty(0), 0.0
    for start in range(0, tokens, chunk):
        watch.wait_for_all_but(2 * len(layers))  # else the host would be chunks ahead when time is up
        if time.monotonic() > deadline:
            raise OutOfTime
        stop = min(start + chunk, tokens)
        x = embeddings(start, stop)
        cos, sin = (table[start:stop] for table in angles)
        began = time.perf_counter()
        attention.begin_chunk(start, stop)
        planning += time.perf_counter() - began
        for layer in layers:

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return attention.run(q, k, v, watch)

            with watch("all"):
                x = layer.run(x, cos, sin, attention.slots[start:stop], attend)
        hidden = x
    spent = watch.seconds()
    linear = spent["all"] - spent["attention"] - spent.get("left out", 0.0)
    return Prefill(len(layers), spent["attention"], linear, planning, hidden)


def measure_length(
    tokens: int,
    chunk: int,
    num_layers: int,
    shape: Shape,
    names: Sequence[str],
    executor: str,
    device: str,
    dense_below: int = DENSE_BELOW,
    deadline: float = math.inf,
    report: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures of dense attention and of every config in `names`, for one prompt of `tokens` tokens.

    Args:
        deadline: on the clock of `time.monotonic`; what does not end before it is not in the report.
        report: figures of an earlier run, which are not measured again.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    modality_map = video_map(tokens)
    random = torch.Generator(device).manual_seed(0)
    layers = [Layer(shape, tokens, dtype, device, random) for _ in range(num_layers)]
    angles = mrope(modality_map, shape, device, dtype)
    noise = torch.randn(chunk + 997, shape.hidden, generator=random, device=device).to(dtype)

    def embeddings(start: int, stop: int) -> torch.Tensor:
        shift = start // chunk % 997  # each chunk is another piece of the same noise, which saves 7.5 GB
        return noise[shift : shift + stop - start]

    report = {**(report or {}), "tokens": tokens, "chunk": chunk, "layers_measured": num_layers, "layers": LAYERS}
    for name in ("dense", *names):
        if name in report:
            continue
        heads = [] if name == "dense" else heads_of(name, modality_map, shape.heads)
        attention: Attention = DenseAttention(tokens, device)
        if name != "dense":
            attention = SparseAttention(modality_map, heads, executor, device, dense_below)
        warm = tuple(table[: 2 * chunk] for table in angles)
        try:
            prefill(layers[:2], embeddings, warm, attention, chunk, device, deadline)  # compiles
            measured = prefill(layers, embeddings, angles, attention, chunk, device, deadline)
        except OutOfTime:
            break
        figures: dict[str, Any] = {"seconds": measured.scaled(LAYERS, planning=name != "dense")}
        if name != "dense":
            sparse, dense = figures["seconds"], report["dense"]["seconds"]
            figures["density"] = round(density(modality_map, heads, chunk, device, dense_below), 4)
            figures |= {f"speedup_{part}": round(dense[part] / sparse[part], 2) for part in ("total", "attention")}
            figures["planning_share_of_attention"] = round(sparse["planning"] / sparse["attention"], 4)
        report[name] = figures
    return report


def density(
    modality_map: ModalityMap, layers: Sequence[Sequence[HeadPattern]], chunk: int, device: str, dense_below: int
) -> float:
    """Visited over causal pairs of the whole prefill, the mean over the heads of at most 4 layers. If there are more
    than 32 chunks, only every eighth is planned."""
    visited = causal = 0.0
    layers = layers[:4]
    tokens = modality_map.length
    starts = range(0, tokens, chunk)
    for start in starts if len(starts) <= 32 else starts[4::8]:
        stop = min(start + chunk, tokens)
        request = RequestChunk(modality_map, start, stop, 0, torch.arange(stop, device=device))
        planner = BatchPlanner([request], stop - start, dense_below=dense_below)
        visited += sum(measure.visited_pairs(planner.plan(heads)) for heads in layers) / len(layers)
        causal += measure.causal_pairs(stop - start, stop)
    return visited / causal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(MEASURED_LAYERS))
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--layers", type=int, help="layers to measure; default: fewer, the longer the prompt")
    parser.add_argument("--configs", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument(
        "--executor", choices=tuple(executors.EXECUTORS), help="what runs plans; default: triton, on a CPU torch"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="stop after this long")
    parser.add_argument("--tiny", action="store_true", help="a very small model, on a CPU too")
    parser.add_argument("--out", type=Path, help="default: in sglang_mminfer/benchmarks/results")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("expected a GPU; --tiny runs a very small model without")
    executor = options.executor or ("triton" if device == "cuda" else "torch")
    out = options.out or Path(f"sglang_mminfer/benchmarks/results/gpu_model_prefill_{executor}.json")
    shape, tower, frames, chunk, lengths = Shape(), VisionShape(), 64, options.chunk, options.tokens
    dense_below = DENSE_BELOW
    if options.tiny:
        shape = Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, mrope=(2, 3, 3))
        tower = VisionShape(depth=2, whole=(1,), hidden=32, heads=2, intermediate=48, out=64)
        frames, chunk, lengths, dense_below = 1, 512, [2048], 0
    report: dict[str, Any] = {**machine.describe(), "card": measure.describe_card(), "about": __doc__, "lengths": {}}
    if out.exists():
        report["lengths"] = json.loads(out.read_text())["lengths"]
    report |= {"executor": executor, "shape": asdict(shape), "vision_shape": asdict(tower)}
    deadline = time.monotonic() + 60 * options.minutes
    with torch.inference_mode():
        for tokens in lengths:
            name = f"{tokens} tokens, chunks of {chunk}"
            known = report["lengths"].get(name, {})
            if {"dense", *options.configs, "vision_tower"} <= set(known):
                continue
            layers = options.layers or (2 if options.tiny else MEASURED_LAYERS.get(tokens, 2))
            figures = measure_length(
                tokens, chunk, layers, shape, options.configs, executor, device, dense_below, deadline, known
            )
            if "vision_tower" not in figures and time.monotonic() < deadline:
                figures["vision_tower"] = vision(tokens, frames, tower, device)
            report["lengths"][name] = figures
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(_summary(name, figures), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
            if time.monotonic() > deadline:
                print("Time is up; run again to go on.")
                break
    print(f"Results: {out}")
    return 0


def _summary(name: str, figures: dict[str, Any]) -> str:
    lines = [f"{name} ({figures['layers_measured']} of {LAYERS} layers measured)"]
    for config in ("dense", *CONFIGS):
        if config not in figures:
            continue
        measured = figures[config]
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in measured["seconds"].items())
        speedup = (
            f"; {measured['speedup_total']:.2f} x dense at density {measured['density']:.1%}"
            if "density" in measured
            else ""
        )
        lines.append(f"  {config}: {parts}{speedup}")
    if "vision_tower" in figures:
        lines.append(f"  vision tower, once: {figures['vision_tower']['seconds']:.2f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

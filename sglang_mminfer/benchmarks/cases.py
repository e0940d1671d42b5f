"""The cases of the GPU benchmarks: shapes, patterns at usual densities, conversations; the most important first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from sglang_mminfer.benchmarks.searched import searched_config
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.boundary import Boundary2D, HeadPattern, QBoundary, row_classes
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.patterns.vertical_slash import VerticalSlash

HEAD_DIM = 128
CELLS = 256  # tokens of a frame, 16 x 16
CHUNK = 8192
K = 1024
TARGET = 128 * K  # keys of the cases that the throughput aim is set for
AIM_TFLOPS = {"fa4": 550, "triton": 450}  # on visited tiles, by executor
LENGTHS = (32 * K, 64 * K, 128 * K, 256 * K, 512 * K, 1024 * K)
SHORT = (2 * K, 4 * K, 8 * K, 16 * K)  # where sparse attention may not pay

TEXT, VIDEO, VISION = Modality.TEXT, Modality.VIDEO, Modality.VISION
ROW = "grid row"  # one key in sixteen at any length, so its speed-up is plotted against length
GRID_STATIC = "grid frame, grid_static"
SEARCHED = "searched config"  # a pattern for each head and layer
PATTERNS: dict[str, HeadPattern] = {
    ROW: Grid("row", False, False, True, 0, 128, 1024),
    "a_shape": AShape(1024, 8192),
    "grid frame": Grid("frame", True, True, True, 0, 128, 8192),
    "vertical_slash": VerticalSlash(1000, 6096),
    "q-boundary": QBoundary({TEXT: AShape(1024, 8192), VIDEO: Grid("frame", True, False, True, 0, 128, 8192)}),
    "2d-boundary": Boundary2D(
        {
            (VIDEO, VISION): Grid("row", False, False, True, 0, 128, 1024),
            (VIDEO, TEXT): AShape(128, 1024),
            (TEXT, VISION): AShape(128, 4096),
        }
    ),
    "tri_shape": TriShape(1024, 8192, 128),
    GRID_STATIC: Grid("frame", True, True, True, 0, 128, 1024),
    "dense": Dense(),  # our kernel with every key visited; not one of the cases
}
CHOOSING = {f"adaptive, rank {rank}": Adaptive(64, 256, rank, 0.01) for rank in (8, 16, 32)}
PATTERNS |= CHOOSING  # what choosing keys costs is in the figures of a plan, which is made anew for each layer
FIRST = (GRID_STATIC, ROW, "a_shape", SEARCHED)  # many lines, few lines, none, and everything at once
MEASURED = (*FIRST, *(name for name in PATTERNS if name not in (*FIRST, *CHOOSING, "dense")))
FEW = (ROW, "a_shape", "grid frame")
WITH_TURNS = ("q-boundary", "2d-boundary")  # these patterns need text between the videos
SHAPES = {"28/4": (28, 4), "32/8": (32, 8), "2/1": (2, 1)}  # query and KV heads
LAYERS = {"28/4": 28, "32/8": 32, "2/1": 2}


@dataclass(frozen=True)
class Case:
    """The last `rows` queries of a prompt of `tokens` tokens.

    shape:   a key of `SHAPES`.
    pattern: a key of `PATTERNS`, for all heads, or SEARCHED.
    against: what runs beside our kernel: "dense" or a key of `rivals.AGAINST`.
    slots:   "shuffled": every token lies anywhere in the pool, the worst case of a page table; or "ordered".
    """

    shape: str
    tokens: int
    rows: int
    pattern: str
    against: str = "dense"
    slots: str = "shuffled"

    @property
    def name(self) -> str:
        extra = "" if self.slots == "shuffled" else f", {self.slots} slots"
        beside = "" if self.against == "dense" else f", against {self.against}"
        return f"{self.shape} heads, {self.tokens} keys, {self.rows} rows, {self.pattern}{extra}{beside}"

    @property
    def is_whole(self) -> bool:
        return self.rows == self.tokens

    @property
    def inputs(self) -> tuple[str, int, int, str]:
        """Cases with equal values here run on the same tensors."""
        return self.shape, self.tokens, self.rows, self.slots


def cases(optional: tuple[str, ...] = ()) -> Iterator[Case]:
    """All cases, each once, the most informative first.

    Args:
        optional: those keys of `rivals.OPTIONAL` that are installed.
    """
    yield from dict.fromkeys(_cases(optional))


def _cases(optional: tuple[str, ...]) -> Iterator[Case]:
    qwen, longest = "28/4", LENGTHS[-1]
    for pattern in FIRST:
        yield Case(qwen, TARGET, CHUNK, pattern)
    for pattern in FIRST:
        yield Case(qwen, longest, CHUNK, pattern)
    for tokens, pattern in product((8 * K, 32 * K, TARGET, longest), CHOOSING):
        yield Case(qwen, tokens, min(tokens, CHUNK), pattern)
    for pattern in MEASURED:
        yield Case(qwen, TARGET, CHUNK, pattern)
    for tokens, pattern in product(SHORT, (ROW, GRID_STATIC)):
        yield Case(qwen, tokens, tokens, pattern)
    for tokens in LENGTHS:
        yield Case(qwen, tokens, CHUNK, GRID_STATIC)
    for rows in (2048, 2 * CHUNK):
        yield Case(qwen, TARGET, rows, GRID_STATIC)
    for tokens in LENGTHS[:-1]:
        for pattern in FEW:
            yield Case(qwen, tokens, CHUNK, pattern)
        yield Case(qwen, tokens, tokens, ROW)
    yield Case(qwen, longest, longest, ROW)
    yield Case(qwen, TARGET, CHUNK, ROW, slots="ordered")
    for against in (*optional, "flex_attention"):
        yield Case(qwen, TARGET, CHUNK, "a_shape", against)
        yield Case(qwen, TARGET, CHUNK, ROW, against)
    for pattern in MEASURED:
        yield Case("32/8", TARGET, CHUNK, pattern)
    for tokens in (TARGET, longest):
        yield Case(qwen, tokens, 2 * CHUNK, ROW)
    for tokens, pattern in product(LENGTHS, FEW):
        yield Case("32/8", tokens, CHUNK, pattern)
    for tokens, pattern in product(LENGTHS[:4], PATTERNS):
        if pattern != "dense" and pattern not in CHOOSING:
            yield Case(qwen, tokens, tokens, pattern)
    for tokens, pattern in product(reversed(LENGTHS), MEASURED):
        yield Case(qwen, tokens, CHUNK, pattern)
    for shape, tokens, pattern in product((qwen, "32/8"), LENGTHS, FEW):
        yield Case(shape, tokens, 2 * CHUNK, pattern)
    for tokens in LENGTHS:
        yield Case("32/8", tokens, tokens, ROW)


def tiny_cases() -> Iterator[Case]:
    """Small cases for a CPU and Triton's interpreter: they show that the program works."""
    yield Case("2/1", 512, 32, "grid frame")
    yield Case("2/1", 384, 384, ROW)
    yield Case("2/1", 512, 32, "vertical_slash")
    yield Case("2/1", 1024, 32, "adaptive, rank 8")
    yield Case("2/1", 512, 32, SEARCHED)


def layers(case: Case) -> list[tuple[HeadPattern, ...]]:
    """[layers][heads]: the patterns that the layers of a model run."""
    heads = SHAPES[case.shape][0]
    if case.pattern != SEARCHED:
        return [(PATTERNS[case.pattern],) * heads] * LAYERS[case.shape]
    return searched_layers(conversation(case), heads)[: LAYERS[case.shape]]


def searched_layers(modality_map: ModalityMap, heads: int) -> list[tuple[HeadPattern, ...]]:
    """[layers][heads]: what `searched_config` draws, without heads whose video rows see all of the video.

    These are dense, whoever runs them. So there are fewer layers than were drawn.
    """
    sparse = [head for row in searched_config(modality_map) for head in row if not _sees_all_video(head)]
    return [tuple(sparse[start : start + heads]) for start in range(0, len(sparse) - heads + 1, heads)]


def _sees_all_video(head: HeadPattern) -> bool:
    pairs = [pair for rows in row_classes(head) if rows.rows in (None, VIDEO) for pair in rows.pairs]
    return any(isinstance(pattern, Dense) and (keys is None or keys.covers(VIDEO)) for keys, pattern in pairs)


def conversation(case: Case) -> ModalityMap:
    return turns_map(case.tokens) if case.pattern in WITH_TURNS else video_map(case.tokens)


def video_map(tokens: int) -> ModalityMap:
    """One video with 64 tokens of text after it; the rest, at least 64 tokens, is text before it."""
    frames = (tokens - 128) // CELLS
    start = tokens - 64 - frames * CELLS
    return ModalityMap([Segment(TEXT, 0, start), _video(start, frames), Segment(TEXT, tokens - 64, tokens)])


def turns_map(tokens: int) -> ModalityMap:
    """Turns of 8,192 tokens, or two turns in a shorter prompt: a video, and about an eighth of text around it. Text
    fills up the last turn."""
    turn = min(8192, tokens // 2)
    frames = 7 * turn // (8 * CELLS)
    segments: list[Segment] = []
    for start in range(0, tokens - turn + 1, turn):
        video = _video(start + 64, frames)
        segments += [Segment(TEXT, start, start + 64), video, Segment(TEXT, video.stop, start + turn)]
    stop = segments[-1].stop if segments else 0
    return ModalityMap([*segments, Segment(TEXT, stop, tokens)] if stop < tokens else segments)


def _video(start: int, frames: int) -> Segment:
    stop = start + frames * CELLS
    return Segment(VIDEO, start, stop, VisionGrid(frames, 16, 16, tuple(range(start, stop, CELLS))))

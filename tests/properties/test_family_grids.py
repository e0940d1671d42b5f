"""Grid heads on every family's map: exact, and the same however a prompt is cut, wherever a cached prefix ends, and
whatever else is in the batch."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from sglang_mminfer import Boundary2D, Grid, Modality, ModalityMap, QBoundary, pattern_mask
from sglang_mminfer.families.generic import SpanReader
from sglang_mminfer.families.grid_thw import FrameSpanReader, GridReader
from sglang_mminfer.families.internvl import geometry as internvl
from sglang_mminfer.families.llava_hf.geometry import LlavaReader
from sglang_mminfer.families.maps import map_from_mm_inputs
from sglang_mminfer.families.nvila import geometry as nvila
from sglang_mminfer.families.own.geometry import PlacedReader
from sglang_mminfer.head_config import HeadConfig, HeadConfigError, Provenance
from sglang_mminfer.modality.items import KEY, Place
from support import Batch, alone, cut_out


def item(kind: str, *spans: tuple[int, int], **data):
    """Spans as (start, tokens)."""
    offsets = [(start, start + tokens - 1) for start, tokens in spans]
    return SimpleNamespace(modality=kind, offsets=offsets, model_specific_data=data)


def placed(kind: str, start: int, apart: int, frames: int, rows: int, cols: int, tail: int = 0):
    """A medium whose items say where they belong: one for each frame, each `apart` tokens behind the one before."""
    return [
        item(kind, (start + apart * n, rows * cols + tail), **{KEY: [Place(start, n, frames, rows, cols, tail)]})
        for n in range(frames)
    ]


# Layouts as the tests of each family's geometry find them in real prompts, with few cells: media, each of its items.
ONEVISION = LlavaReader(3, 42, 2, 1, ((1, 1), (1, 2), (2, 1), (2, 2)), 9)
NEXT_VIDEO = LlavaReader(4, 56, 2, 0, ((1, 2), (2, 1), (2, 2)), 0)
NVILA_VIDEOS = [placed("VIDEO", 8, 5, 4, 2, 2), placed("VIDEO", 85, 5, 3, 2, 2)]
FAMILIES = {
    "qwen2_5_vl": (
        [
            [item("VIDEO", (7, 24), video_grid_thw=[[4, 4, 6]])],
            [item("IMAGE", (44, 8), image_grid_thw=[[1, 4, 8]])],
            [item("VIDEO", (70, 18), video_grid_thw=[[3, 4, 6]])],
        ],
        GridReader(),
    ),
    "qwen3_vl": (
        [
            [item("VIDEO", (9, 6), (26, 6), (44, 6), video_grid_thw=[[3, 4, 6]])],
            [item("IMAGE", (60, 8), image_grid_thw=[[1, 4, 8]])],
            [item("VIDEO", (80, 6), (97, 6), video_grid_thw=[[2, 4, 6]])],
        ],
        FrameSpanReader(),
    ),
    "internvl": (
        [
            placed("VIDEO", 8, 13, 4, 2, 2),
            [item("IMAGE", (62, 12))],
            placed("VIDEO", 85, 13, 2, 2, 2),
        ],
        internvl.TileReader(2),
    ),
    # A single image is cut: into one raster by NVILA, into tiles of its own by NVILA-Lite.
    "nvila": ([placed("IMAGE", 40, 24, 1, 4, 6), *NVILA_VIDEOS], nvila.TileReader(2)),
    "nvila_lite": (
        [placed("IMAGE", 40, 6, 5, 2, 2), *NVILA_VIDEOS],
        nvila.TileReader(2),
    ),
    "llava_onevision": (
        [[item("VIDEO", (5, 33))], [item("IMAGE", (45, 9 + 6 * 7), image_sizes=[[84, 84]])]],
        ONEVISION,
    ),
    "llava_next_video": (
        [[item("VIDEO", (5, 32))], [item("IMAGE", (45, 16 + 4 * 9), image_sizes=[[56, 112]])]],
        NEXT_VIDEO,
    ),
    # Newlines: the last column of a picture that was cut up, or one behind a whole one.
    "llava_original": (
        [
            [item("IMAGE", (6, 9 + 4 * 6), **{KEY: [(0, 0, 1, 3, 3, 0), (0, 0, 1, 4, 6, 0)]})],
            [item("IMAGE", (50, 10), **{KEY: [(1, 0, 1, 3, 3, 1)]})],
            [item("IMAGE", (75, 10), **{KEY: [(2, 0, 1, 3, 3, 1)]})],
        ],
        SpanReader(),
    ),
    # Frame behind frame, the last column of each newlines; of a picture the whole and its tiles.
    "llava_video": (
        [
            placed("VIDEO", 7, 12, 4, 3, 4),
            placed("IMAGE", 62, 9, 1, 3, 3),
            placed("IMAGE", 71, 8, 1, 2, 4),
            placed("VIDEO", 85, 12, 2, 3, 4),
        ],
        PlacedReader(),
    ),
    # A word between frames.
    "longvila": (
        [placed("VIDEO", 6, 10, 4, 3, 3), placed("IMAGE", 56, 10, 1, 3, 3), placed("VIDEO", 80, 10, 3, 3, 3)],
        PlacedReader(),
    ),
    "videochat_flash": (
        [placed("VIDEO", 6, 8, 5, 1, 8), placed("IMAGE", 56, 8, 1, 1, 8), placed("VIDEO", 80, 8, 3, 1, 8)],
        PlacedReader(merged=True),
    ),
}
LENGTH = 120
MERGED = "videochat_flash"

FRAME, ROW = (Grid(stride, v=True, h=True, s=True, phase=1, sink=3, local=6) for stride in ("frame", "row"))
HEADS = {
    "frame": FRAME,
    "row": ROW,
    "q": QBoundary({Modality.VISION: FRAME}),
    "2d": Boundary2D({(Modality.VISION, Modality.VISION): ROW, (Modality.TEXT, Modality.VISION): FRAME}),
}
MERGED_HEADS = {
    "frame": FRAME,
    "q": QBoundary({Modality.VISION: FRAME}),
    "2d": Boundary2D({(Modality.VISION, Modality.VISION): FRAME, (Modality.TEXT, Modality.VISION): FRAME}),
}


def heads_of(family: str) -> dict:
    return MERGED_HEADS if family == MERGED else HEADS


families = pytest.mark.parametrize("family", FAMILIES)
cases = pytest.mark.parametrize("family, head", [(family, head) for family in FAMILIES for head in heads_of(family)])


def map_of(family: str, media: list | None = None, length: int = LENGTH) -> ModalityMap:
    own, reader = FAMILIES[family]
    items = [one for medium in (own if media is None else media) for one in medium]
    return map_from_mm_inputs(SimpleNamespace(mm_items=items), length, reader)


def earlier_turn(family: str) -> ModalityMap:
    """The conversation as it was before its last medium."""
    *before, last = FAMILIES[family][0]
    return map_of(family, before, last[0].offsets[0][0] - 2)


@families
def test_every_medium_has_a_raster(family):
    vision = [s for s in map_of(family).segments if s.modality is not Modality.TEXT]
    assert len(vision) >= len(FAMILIES[family][0])
    assert all(segment.grid is not None and segment.grid.raster == (family != MERGED) for segment in vision)


@cases
def test_chunks_and_prefixes_change_nothing(family, head):
    whole = Batch([map_of(family)], [LENGTH], [LENGTH], [heads_of(family)[head]])
    wrapper = whole.planned()
    out, lse = whole.run(wrapper)
    visited = wrapper.visited_mask(0, 0)
    assert (whole.exact_mask(0, 0) & ~visited).sum() == 0
    assert wrapper.density[0] < 1
    for size in (19, 64):
        for start in range(0, LENGTH, size):
            stop = min(LENGTH, start + size)
            part = cut_out(whole, 0, start, stop, seed=start + size)
            planned = part.planned()
            part_out, part_lse = part.run(planned)
            assert torch.equal(planned.visited_mask(0, 0), visited[start:stop, :stop])
            torch.testing.assert_close(part_out, out[start:stop], rtol=2e-5, atol=5e-6)
            torch.testing.assert_close(part_lse, lse[start:stop], rtol=2e-5, atol=5e-6)


@cases
def test_a_later_turn_moves_nothing(family, head):
    """The conversation without its last medium is the beginning of the whole one."""
    before = earlier_turn(family)
    pattern = heads_of(family)[head]
    whole = alone(map_of(family), pattern).planned().visited_mask(0, 0)
    turn = alone(before, pattern).planned().visited_mask(0, 0)
    assert torch.equal(turn, whole[: before.length, : before.length])


@families
def test_what_else_is_in_the_batch_changes_nothing(family):
    """Chunks of several conversations in one ragged batch: each visits, and gives, what it does alone."""
    seed = len(family)  # another order and another page size for each
    heads = list(heads_of(family).values())
    before = earlier_turn(family)
    whole = Batch([map_of(family)], [LENGTH], [LENGTH], heads, seed=seed)
    turn = Batch([before], [before.length], [before.length], heads, seed=seed + 10)
    chosen = random.Random(seed)
    requests = [
        *(cut_out(whole, 0, *chunk) for chunk in ((0, 29), (29, 64), (71, LENGTH), (LENGTH - 1, LENGTH))),
        *(cut_out(turn, 0, *chunk) for chunk in ((0, before.length), (17, 31))),
    ]
    chosen.shuffle(requests)
    batch = Batch(
        [one.maps[0] for one in requests],
        [one.q_lens[0] for one in requests],
        [one.kv_lens[0] for one in requests],
        heads,
        page_size=chosen.choice([1, 4, 16]),
        seed=seed,
        qs=[one.qs[0] for one in requests],
        ks=[one.ks[0] for one in requests],
        vs=[one.vs[0] for one in requests],
    )
    together = batch.planned()
    out, lse = batch.run(together)
    for i, one in enumerate(requests):
        own = one.planned()
        own_out, own_lse = one.run(own)
        for head in range(len(heads)):
            assert torch.equal(together.visited_mask(i, head), own.visited_mask(0, head))
        torch.testing.assert_close(out[batch.rows(i)], own_out, rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(lse[batch.rows(i)], own_lse, rtol=2e-5, atol=5e-6)


# Where tokens are merged there are no columns. A config for such a model may not ask for them; a map that is given
# to the wrapper is one of many, so there the head sees all of what it cannot place.


def test_a_row_stride_without_a_raster_sees_all_from_the_first_medium_on():
    mmap = map_of(MERGED)
    visited = alone(mmap, ROW).planned().visited_mask(0, 0)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert torch.equal(visited[mmap.first_vision :] & causal[mmap.first_vision :], causal[mmap.first_vision :])
    assert not (pattern_mask(mmap, ROW, 0, LENGTH, LENGTH) & ~visited).any()


@pytest.mark.parametrize("head", [ROW, HEADS["2d"], QBoundary({Modality.VISION: ROW})], ids=["row", "2d", "q"])
def test_a_config_with_a_row_stride_is_refused_for_a_model_without_a_raster(head):
    config = HeadConfig("rows", Provenance("handwritten", "A test."), "all", ((head,),))
    config.bind(Qwen2Config(architectures=["Qwen2ForCausalLM"]))
    with pytest.raises(HeadConfigError, match=r'heads\.all: a grid of stride "row" needs columns'):
        config.bind(SimpleNamespace(model_type="videochat_flash", vision_tokens_merged=True))

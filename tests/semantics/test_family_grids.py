"""Grid heads on every family's map: exact, and the same however a prompt is cut and wherever a cached prefix ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import Batch, cut_out

from sglang_mminfer import Boundary2D, Grid, Modality, ModalityMap, QBoundary
from sglang_mminfer.modality.geometry import VIDEO_KEY, map_from_mm_inputs


def item(kind: str, *spans: tuple[int, int], **data):
    """Spans as (start, tokens)."""
    offsets = [(start, start + tokens - 1) for start, tokens in spans]
    return SimpleNamespace(modality=kind, offsets=offsets, model_specific_data=data)


# Layouts as the tests of each family's geometry find them in real prompts, with few cells.
QWEN3 = [
    item("VIDEO", (9, 6), (26, 6), (44, 6), video_grid_thw=[[3, 4, 6]]),
    item("IMAGE", (60, 8), image_grid_thw=[[1, 4, 8]]),
    item("VIDEO", (80, 6), (97, 6), video_grid_thw=[[2, 4, 6]]),
]
INTERNVL = [
    *(item("VIDEO", (8 + 13 * frame, 4), **{VIDEO_KEY: 0}) for frame in range(4)),
    item("IMAGE", (62, 12)),
    *(item("VIDEO", (85 + 13 * frame, 4), **{VIDEO_KEY: 1}) for frame in range(2)),
]
ONEVISION_LAYOUT = "llava_hf:[3,42,2,1,[[1,1],[1,2],[2,1],[2,2]],9]"
ONEVISION = [item("VIDEO", (5, 33)), item("IMAGE", (45, 9 + 6 * 7), image_sizes=[[84, 84]])]
NEXT_VIDEO_LAYOUT = "llava_hf:[4,56,2,0,[[1,2],[2,1],[2,2]],0]"
NEXT_VIDEO = [item("VIDEO", (5, 32)), item("IMAGE", (45, 16 + 4 * 9), image_sizes=[[56, 112]])]
# One image is cut: into tiles of its own by NVILA-Lite, into one raster by NVILA.
NVILA_VIDEOS = [
    *(item("VIDEO", (8 + 5 * frame, 4), **{VIDEO_KEY: 1}) for frame in range(4)),
    *(item("VIDEO", (85 + 5 * frame, 4), **{VIDEO_KEY: 2}) for frame in range(3)),
]
NVILA = [item("IMAGE", (40, 24), block_sizes=[(2, 3)], **{VIDEO_KEY: 0}), *NVILA_VIDEOS]
NVILA_LITE = [*(item("IMAGE", (40 + 6 * tile, 4), **{VIDEO_KEY: 0}) for tile in range(5)), *NVILA_VIDEOS]

FAMILIES = {
    "qwen3_vl": (QWEN3, "qwen3_vl"),
    "internvl": (INTERNVL, "internvl:2"),
    "llava_onevision": (ONEVISION, ONEVISION_LAYOUT),
    "llava_next_video": (NEXT_VIDEO, NEXT_VIDEO_LAYOUT),
    "nvila": (NVILA, "nvila:2"),
    "nvila_lite": (NVILA_LITE, "nvila:2"),
}
LENGTH = 120

FRAME, ROW = (Grid(stride, v=True, h=True, s=True, phase=1, sink=3, local=6) for stride in ("frame", "row"))
HEADS = {
    "frame": FRAME,
    "row": ROW,
    "q": QBoundary({Modality.VISION: FRAME}),
    "2d": Boundary2D({(Modality.VISION, Modality.VISION): ROW, (Modality.TEXT, Modality.VISION): FRAME}),
}

families = pytest.mark.parametrize("family", FAMILIES)
heads = pytest.mark.parametrize("head", HEADS)


def map_of(family: str, items: list | None = None, length: int = LENGTH) -> ModalityMap:
    own, name = FAMILIES[family]
    return map_from_mm_inputs(SimpleNamespace(mm_items=own if items is None else items), length, name)


@families
def test_every_medium_has_a_raster(family):
    vision = [s for s in map_of(family).segments if s.modality is not Modality.TEXT]
    assert vision and all(segment.grid is not None for segment in vision)


@families
@heads
def test_chunks_and_prefixes_change_nothing(family, head):
    whole = Batch([map_of(family)], [LENGTH], [LENGTH], [HEADS[head]])
    wrapper = whole.planned()
    out, lse = whole.run(wrapper)
    visited = wrapper.visited_mask(0, 0)
    assert (whole.exact_mask(0, 0) & ~visited).sum() == 0
    assert wrapper.density[0] < 1
    for size in (7, 29, 64):
        for start in range(0, LENGTH, size):
            stop = min(LENGTH, start + size)
            part = cut_out(whole, 0, start, stop, seed=start + size)
            planned = part.planned()
            part_out, part_lse = part.run(planned)
            assert torch.equal(planned.visited_mask(0, 0), visited[start:stop, :stop])
            torch.testing.assert_close(part_out, out[start:stop], rtol=2e-5, atol=5e-6)
            torch.testing.assert_close(part_lse, lse[start:stop], rtol=2e-5, atol=5e-6)


@families
@heads
def test_a_later_turn_moves_nothing(family, head):
    """The conversation without its last medium is the beginning of the whole one."""
    items, _ = FAMILIES[family]
    last = items[-1]
    if VIDEO_KEY in last.model_specific_data:
        video = last.model_specific_data[VIDEO_KEY]
        before = [item for item in items if item.model_specific_data.get(VIDEO_KEY) != video]
    else:
        before = items[:-1]
    length = next(item for item in items if item not in before).offsets[0][0] - 2
    whole = Batch([map_of(family)], [LENGTH], [LENGTH], [HEADS[head]]).planned().visited_mask(0, 0)
    turn = Batch([map_of(family, before, length)], [length], [length], [HEADS[head]]).planned().visited_mask(0, 0)
    assert torch.equal(turn, whole[:length, :length])

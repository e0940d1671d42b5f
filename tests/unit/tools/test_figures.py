"""Pictures show what was planned: the data behind every picture against the plan, on odd maps too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import AShape, Boundary2D, Grid, Modality, ModalityMap, QBoundary, Segment, VisionGrid
from sglang_mminfer.families.grid_thw import GridReader
from sglang_mminfer.families.maps import GeometryError
from sglang_mminfer.kernels import reference
from sglang_mminfer.serving.trace import PrefillRecord, density_of_records
from sglang_mminfer.tools import figures as f
from support import maps

TEXT, IMAGE, VIDEO = Modality.TEXT, Modality.IMAGE, Modality.VIDEO
GRID = Grid("frame", True, True, True, 1, 8, 16)
HEADS = [
    AShape(8, 24),
    GRID,
    QBoundary({VIDEO: GRID, TEXT: AShape(8, 24)}),
    Boundary2D({(Modality.VISION, Modality.VISION): GRID, (Modality.VISION, TEXT): AShape(8, 8)}),
]
LONE = ModalityMap([Segment(TEXT, 0, 1)])
WORDS = ModalityMap([Segment(TEXT, 0, 500)])
NO_RASTER = ModalityMap([Segment(IMAGE, 0, 90), Segment(VIDEO, 90, 400)])


def video(start: int, frames: int, rows: int, cols: int) -> Segment:
    starts = tuple(start + i * rows * cols for i in range(frames))
    return Segment(VIDEO, start, start + frames * rows * cols, VisionGrid(frames, rows, cols, starts))


def conversation() -> ModalityMap:
    """Text, video, text, image, text, video, text: 1,300 tokens."""
    image = Segment(IMAGE, 650, 698, VisionGrid(1, 6, 8, (650,)))
    return ModalityMap(
        [
            *(Segment(TEXT, 0, 10), video(10, 20, 5, 6), Segment(TEXT, 610, 650), image),
            *(Segment(TEXT, 698, 710), video(710, 19, 5, 6), Segment(TEXT, 1280, 1300)),
        ]
    )


def record(prefix_len: int, chunk_len: int, density: float | None = 0.5) -> PrefillRecord:
    return PrefillRecord(
        rid="a",
        prefix_len=prefix_len,
        chunk_len=chunk_len,
        seq_len=prefix_len + chunk_len,
        segments=3,
        sparse_layers=2,
        density=density,
        dense_reason=None if density is not None else "short",
        plan_ms=1.0,
        attn_ms=1.0,
        forward_ms=1.0,
    )


# ---- data --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(maps(), st.sampled_from(HEADS), st.integers(0, 60))
def test_single_pairs_are_the_visited_mask(modality_map: ModalityMap, head, dense_below: int) -> None:
    plan = f.plan_of(modality_map, [head], dense_below)
    length = modality_map.length
    drawn = f.visited_share(plan, 0, 1)
    below = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(drawn.isnan(), ~below)
    assert torch.equal(drawn.nan_to_num() == 1, reference.visited_mask(plan, 0, slice(0, length), length))


@pytest.mark.parametrize("head", range(len(HEADS)))
@pytest.mark.parametrize("bin_size", [1, 7, 64, 5000])
def test_squares_add_up_to_the_plan(head: int, bin_size: int) -> None:
    modality_map = conversation()
    plan = f.plan_of(modality_map, HEADS, dense_below=100)
    everything = (0, modality_map.length)
    pairs = f.visited_share(plan, head, bin_size) * f.causal_pairs(everything, everything, bin_size)
    assert pairs.nansum().item() == pytest.approx(plan.visited_by_row[:, head].sum().item(), rel=1e-12)


@pytest.mark.parametrize("head", range(len(HEADS)))
def test_a_part_of_the_matrix_is_that_part(head: int) -> None:
    plan = f.plan_of(conversation(), HEADS)
    rows, keys = (903, 1101), (33, 131)
    whole = f.visited_share(plan, head, 1)[slice(*rows), slice(*keys)]
    torch.testing.assert_close(f.visited_share(plan, head, 1, rows, keys), whole, equal_nan=True)
    coarse = f.visited_share(plan, head, 20, rows, keys)
    assert coarse.shape == (10, 5)
    assert coarse[0, 0] == pytest.approx(whole[:20, :20].mean().item())
    assert coarse[-1, -1] == pytest.approx(whole[180:, 80:].mean().item())


def test_causal_pairs_on_the_diagonal() -> None:
    assert f.causal_pairs((0, 5), (0, 5), 2).tolist() == [[3, 0, 0], [4, 3, 0], [2, 2, 1]]


def test_a_prompt_gives_back_its_map() -> None:
    expected = conversation()
    pads = {IMAGE: 1001, VIDEO: 1002}
    ids = [pads.get(s.modality, 7) for s in expected.segments for _ in range(s.stop - s.start)]
    grids = {IMAGE: [(1, 12, 16)], VIDEO: [(20, 10, 12), (19, 10, 12)]}
    assert f.map_of_prompt(ids, pads, grids, GridReader()) == expected
    assert f.map_of_prompt([7] * 4, pads, grids, GridReader()) == ModalityMap([Segment(TEXT, 0, 4)])
    with pytest.raises(GeometryError, match="grid of 19 x 10 x 12"):
        f.map_of_prompt(ids, pads, {**grids, VIDEO: [(19, 10, 12), (20, 10, 12)]}, GridReader())


def test_turns_and_density_of_a_trace() -> None:
    records = [record(116, 34, 0.25), record(16, 100, None)]
    turn = f.turn_of_records("one", records)
    assert turn == f.Turn("one", ((16, 116), (116, 150)))
    assert (turn.cached, turn.prompt) == (16, 150)
    dense, sparse = (17 + 116) * 100 / 2, (117 + 150) * 34 / 2
    assert density_of_records(records) == pytest.approx((dense + 0.25 * sparse) / (dense + sparse))
    assert density_of_records([]) is None
    unknown = record(150, 10)
    unknown.density = None  # as on a GPU without a trace, where an estimate picks tiles
    assert density_of_records([*records, unknown]) is None
    with pytest.raises(ValueError, match="expected a chunk that starts at 150, got one at 140"):
        f.turn_of_records("one", [*records, record(140, 5)])


def test_the_closer_look_is_between_the_videos() -> None:
    start, stop = f.busiest_stretch(conversation()) or (0, 0)
    assert 590 <= start < 610 and 710 < stop <= 730
    assert f.busiest_stretch(WORDS) is None
    assert f.busiest_stretch(LONE) is None


def test_the_detail_is_below_the_diagonal() -> None:
    (r0, r1), (k0, k1) = f.detail_window(conversation()) or ((0, 0), (0, 0))
    assert k0 < k1 < r0 < r1 and r1 - r0 == k1 - k0 == 90
    assert f.detail_window(conversation(), dense_below=1200) is None
    for odd in (LONE, WORDS, NO_RASTER):
        assert f.detail_window(odd) is None


# ---- drawings ----------------------------------------------------------------------------------------------


def pixels(figure, folder: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(f.save(figure, folder / "made on the way" / "figure.png", dpi=40)) as image:
        return np.asarray(image.convert("RGB"))


TURNS = [
    f.Turn("turn 1: video", ((0, 300), (300, 650))),
    f.Turn("turn 2: image", ((655, 710),)),
    f.Turn("turn 3: second video", ((710, 1000), (1000, 1300))),
]


def test_the_picture_of_a_conversation(tmp_path: Path) -> None:
    figure = f.conversation_figure(conversation(), TURNS, [(h.kind, h) for h in HEADS], title="a title")
    assert len(pixels(figure, tmp_path).reshape(-1, 3).std(axis=0).nonzero()[0]) == 3
    whole, closer, *matrices = figure.axes[: 2 + len(HEADS)]
    assert [label.get_text().splitlines()[1] for label in whole.get_yticklabels()] == [
        *("0 cached + 650 new", "655 cached + 55 new", "710 cached + 590 new")
    ]
    assert closer.get_xlim()[0] > 0
    for number, matrix in enumerate(matrices):
        drawn = matrix.images[0].get_array()
        expected = f.visited_share(f.plan_of(conversation(), HEADS), number, -(-1300 // f.BINS))
        np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), expected.numpy())


@pytest.mark.parametrize("odd", [LONE, WORDS, NO_RASTER, ModalityMap([video(0, 1, 1, 1)]), ModalityMap([])])
@pytest.mark.parametrize("heads", [[], [("a_shape", AShape(1, 4)), ("grid", GRID)]])
def test_odd_maps_are_drawn(odd: ModalityMap, heads: list, tmp_path: Path) -> None:
    turns = [f.Turn("turn 1", ((0, odd.length),)), f.Turn("nothing new", ())]
    assert pixels(f.conversation_figure(odd, turns, heads), tmp_path).std() > 0
    assert pixels(f.conversation_figure(odd, [], heads), tmp_path).std() > 0

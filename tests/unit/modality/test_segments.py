"""The modality map itself: what it refuses, and its per-token views against token-by-token loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_mminfer import Modality, ModalityMap, Segment, VisionGrid


@st.composite
def maps(draw):
    """Random maps with gaps between frames, separators before and after them, and segments without a grid."""
    segments, position = [], 0
    for _ in range(draw(st.integers(0, 6))):
        modality = draw(st.sampled_from([Modality.TEXT, Modality.IMAGE, Modality.VIDEO]))
        grid, start = None, position
        if modality is Modality.TEXT or draw(st.booleans()):
            position += draw(st.integers(1, 9))
        else:
            frames = draw(st.integers(1, 4)) if modality is Modality.VIDEO else 1
            rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 4))
            starts = []
            for _ in range(frames):
                position += draw(st.integers(0, 2))
                starts.append(position)
                position += rows * cols
            position += draw(st.integers(0, 2))
            grid = VisionGrid(frames, rows, cols, starts, raster=rows > 1 or draw(st.booleans()))
        segments.append(Segment(modality, start, position, grid))
    return ModalityMap(segments)


@given(maps())
def test_views_agree_with_a_walk_over_the_tokens(mmap):
    owner = [next(i for i, s in enumerate(mmap.segments) if s.start <= k < s.stop) for k in range(mmap.length)]
    assert mmap.segment_ids.tolist() == owner
    for modality in Modality:
        expected = [
            mmap.segments[i].modality is modality
            or (modality is Modality.VISION and mmap.segments[i].modality is not Modality.TEXT)
            for i in owner
        ]
        assert mmap.members(modality).tolist() == expected
    for stride in ("frame", "row"):
        cells = []
        for k, i in enumerate(owner):
            grid, cell = mmap.segments[i].grid, -1
            if grid is not None and (grid.raster or stride == "frame"):
                for start in grid.frame_starts:
                    if start <= k < start + grid.cells:
                        cell = k - start if stride == "frame" else (k - start) % grid.cols
            cells.append(cell)
        assert mmap.cells(stride).tolist() == cells
    vision = [k for k, i in enumerate(owner) if mmap.segments[i].modality is not Modality.TEXT]
    assert mmap.has_vision == bool(vision)
    assert mmap.first_vision == (vision[0] if vision else len(mmap))


def test_an_empty_map():
    empty = ModalityMap([])
    assert empty.length == 0 and not empty.has_vision and empty.first_vision == 0
    assert empty.segment_ids.tolist() == [] and empty.cells("row").tolist() == []


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([("text", 0, 4), ("text", 3, 6)], r"segments\[1\]: expected a start of 4, got 3 \(overlaps"),
        ([("text", 0, 4), ("video", 6, 8)], r"segments\[1\]: expected a start of 4, got 6 \(leaves a gap"),
        ([("text", 2, 4)], r"segments\[0\]: expected a start of 0, got 2"),
    ],
)
def test_a_map_has_no_gaps_and_no_overlaps(segments, words):
    with pytest.raises(ValueError, match=words):
        ModalityMap([Segment(Modality(m), a, b) for m, a, b in segments])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Segment(Modality.TEXT, 5, 5), "0 <= start < stop"),
        (lambda: Segment(Modality.TEXT, -1, 5), "0 <= start < stop"),
        (lambda: Segment(Modality.VISION, 0, 5), "got vision"),
        (lambda: Segment(Modality.TEXT, 0, 4, VisionGrid(1, 2, 2, (0,))), "no grid"),
        (lambda: Segment(Modality.VIDEO, 0, 7, VisionGrid(2, 2, 2, (0, 4))), r"covers \[0, 8\)"),
        (lambda: Segment(Modality.VIDEO, 1, 9, VisionGrid(2, 2, 2, (0, 4))), r"covers \[0, 8\)"),
        (lambda: VisionGrid(0, 2, 2, ()), "frames: expected an integer >= 1, got 0"),
        (lambda: VisionGrid(2, 2, 2, (0,)), "expected 2 starts"),
        (lambda: VisionGrid(1, 2, 2, (0,), raster=False), "rows: expected 1 where there is no raster, got 2"),
        (lambda: VisionGrid(2, 2, 2, (0, 3)), "frame 1 starts at 3"),
    ],
)
def test_segments_and_grids_refuse_what_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Segment("text", 0.0, 5), "Segment.start: expected an integer, got 0.0"),
        (lambda: Segment("text", 0, "5"), "Segment.stop: expected an integer, got '5'"),
        (lambda: Segment("text", 0, True), "Segment.stop: expected an integer, got True"),
        (lambda: Segment("audio", 0, 5), "Segment.modality: expected one of text, image, video, vision, got 'audio'"),
        (lambda: Segment("video", 0, 5, (1, 2, 2)), r"Segment.grid: expected a VisionGrid or None, got \(1, 2, 2\)"),
        (lambda: VisionGrid(1, 2.0, 2, (0,)), "VisionGrid.rows: expected an integer, got 2.0"),
        (lambda: VisionGrid(True, 2, 2, (0,)), "VisionGrid.frames: expected an integer, got True"),
        (lambda: VisionGrid(1, 2, 2, 0), "VisionGrid.frame_starts: expected a sequence, got 0"),
        (lambda: VisionGrid(1, 2, 2, (0.5,)), r"VisionGrid.frame_starts\[0\]: expected an integer, got 0.5"),
        (lambda: ModalityMap(None), "ModalityMap.segments: expected a sequence, got None"),
        (lambda: ModalityMap([("text", 0, 5)]), r"ModalityMap.segments\[0\]: expected a Segment, got \('text', 0, 5\)"),
    ],
)
def test_values_of_another_type_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        make()


def test_integers_of_numpy_and_torch_are_integers():
    one = VisionGrid(np.int64(2), torch.tensor(1), np.int32(2), np.array([3, 5]))
    segment = Segment("video", np.int64(3), torch.tensor(7), one)
    assert segment == Segment(Modality.VIDEO, 3, 7, VisionGrid(2, 1, 2, (3, 5)))
    assert {type(value) for value in (segment.start, segment.stop, one.frames, one.rows, *one.frame_starts)} == {int}

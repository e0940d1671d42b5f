"""Geometry on SGLang's own objects, cell by cell against what the token ids and M-RoPE positions say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from transformers import Qwen2_5_VLConfig, Qwen2Config, Qwen2VLConfig

from sglang_mminfer import Modality, ModalityMap, Segment
from sglang_mminfer.families import maps as geometry
from sglang_mminfer.families.grid_thw import GridReader
from sglang_mminfer.families.maps import GeometryError, cached_map, map_from_mm_inputs, reader_of

QWEN_VL = GridReader()
TEXT, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 100, 151652, 151653, 151655, 151656
PAD = {SglModality.IMAGE: IMAGE_PAD, SglModality.VIDEO: VIDEO_PAD}
KEY = {SglModality.IMAGE: "image_grid_thw", SglModality.VIDEO: "video_grid_thw"}


def item(modality, offsets, rows=None, form=torch.tensor, **data):
    if rows is not None:
        data[KEY[modality]] = form(rows)
    return MultimodalDataItem(modality=modality, offsets=offsets, model_specific_data=data)


def inputs(*items, **fields):
    return MultimodalInputs(mm_items=list(items), **fields)


def video(offsets, rows=None, **data):
    return item(SglModality.VIDEO, offsets, rows, **data)


def image(offsets, rows=None, **data):
    return item(SglModality.IMAGE, offsets, rows, **data)


@st.composite
def conversations(draw, merge=2):
    """Token ids of a prompt with Qwen's placeholders, and its media in order: [(modality, (t, h, w))]."""
    ids, media = [], []
    for _ in range(draw(st.integers(0, 6))):
        ids += [TEXT] * draw(st.integers(0, 7))
        kind = draw(st.sampled_from(list(PAD)))
        t = draw(st.integers(1, 5)) if kind is SglModality.VIDEO else 1
        h, w = merge * draw(st.integers(1, 4)), merge * draw(st.integers(1, 5))
        ids += [VISION_START] + [PAD[kind]] * (t * h * w // merge**2) + [VISION_END]
        media.append((kind, (t, h, w)))
    ids += [TEXT] * draw(st.integers(0, 9))
    return ids, media


def itemize(draw, ids, media):
    """Items as SGLang may hold them: media of one modality together or apart, items in any order."""
    items = []
    for kind, pad in PAD.items():
        offsets = BaseMultimodalProcessor.get_mm_items_offset(torch.tensor(ids, dtype=torch.long), pad)
        rows = [list(grid) for k, grid in media if k is kind]
        assert len(offsets) == len(rows)
        while rows:
            n = draw(st.integers(1, len(rows)))
            form = draw(st.sampled_from([torch.tensor, np.array, list]))
            items.append(item(kind, offsets[:n], rows[:n], form))
            offsets, rows = offsets[n:], rows[n:]
    return draw(st.permutations(items))


def walk(ids, media, merge):
    """For each token (modality, number of its medium, frame, row, column), counted along the ids alone."""
    cells, number, count = [], -1, 0
    for token in ids:
        if token == VISION_START:
            number, count = number + 1, 0
        if token not in PAD.values():
            cells.append((Modality.TEXT, None, None, None, None))
            continue
        _, (_, h, w) = media[number]
        per_row, per_frame = w // merge, (h // merge) * (w // merge)
        modality = Modality.IMAGE if token == IMAGE_PAD else Modality.VIDEO
        cells.append((modality, number, count // per_frame, count % per_frame // per_row, count % per_row))
        count += 1
    return cells


def unroll(mmap: ModalityMap):
    """The same from a map, segment by segment."""
    cells, number = [], -1
    for segment in mmap.segments:
        size = segment.stop - segment.start
        if segment.modality is Modality.TEXT:
            cells += [(Modality.TEXT, None, None, None, None)] * size
            continue
        number += 1
        grid = segment.grid
        block = [None] * size
        for f, start in enumerate(grid.frame_starts):
            for c in range(grid.cells):
                where = (segment.modality, number, f, c // grid.cols, c % grid.cols)
                block[start - segment.start + c] = where
        cells += block
    return cells


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_cells_agree_with_the_token_ids(data, merge):
    ids, media = data.draw(conversations(merge))
    mm = inputs(*itemize(data.draw, ids, media))
    config = SimpleNamespace(model_type="qwen2_vl", vision_config=SimpleNamespace(spatial_merge_size=merge))
    mmap = map_from_mm_inputs(mm, len(ids), reader_of(config))
    assert mmap.length == len(ids)
    assert unroll(mmap) == walk(ids, media, merge)
    assert [s.modality.value.upper() for s in mmap.segments if s.grid] == [kind.name for kind, _ in media]
    assert len(mmap.segments) <= 2 * len(media) + 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cells_agree_with_sglangs_mrope_positions(data):
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

    ids, media = data.draw(conversations())
    if not media:
        return
    grids = {
        kind: torch.tensor([grid for k, grid in media if k is kind]).reshape(-1, 3).long()
        for kind in PAD
        if any(k is kind for k, _ in media)
    }
    videos = len(grids.get(SglModality.VIDEO, ()))
    positions, _ = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=2,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        model_type="qwen2_5_vl",
        tokens_per_second=2,
        input_ids=torch.tensor([ids]),
        image_grid_thw=grids.get(SglModality.IMAGE),
        video_grid_thw=grids.get(SglModality.VIDEO),
        second_per_grid_ts=torch.ones(videos) if videos else None,
    )
    positions = positions[:, 0]
    mm = inputs(*itemize(data.draw, ids, media), mrope_positions=positions)
    mmap = cached_map(mm, mm.mrope_positions.shape[1], QWEN_VL)
    frame_cells, row_cells = mmap.cells("frame"), mmap.cells("row")
    for segment in mmap.segments:
        inside = slice(segment.start, segment.stop)
        if segment.grid is None:
            assert (positions[0, inside] == positions[1, inside]).all()
            continue
        t, h, w = positions[:, inside] - positions[:, inside].min(dim=1, keepdim=True).values
        assert torch.equal(frame_cells[inside].long(), h * segment.grid.cols + w)
        assert torch.equal(row_cells[inside].long(), w)
        assert len(t.unique()) == segment.grid.frames


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_generic_knows_modalities_only(data):
    ids, media = data.draw(conversations())
    mmap = map_from_mm_inputs(inputs(*itemize(data.draw, ids, media)), len(ids), None)
    assert [c[0] for c in unroll_modalities(mmap)] == [c[0] for c in walk(ids, media, 2)]
    assert all(segment.grid is None for segment in mmap.segments)


def unroll_modalities(mmap):
    return [(s.modality,) for s in mmap.segments for _ in range(s.start, s.stop)]


def test_a_span_for_each_frame_without_a_grid():
    mm = inputs(video([(3, 6), (9, 12)]), image([(20, 23)]))
    assert map_from_mm_inputs(mm, 26, None).segments == (
        Segment(Modality.TEXT, 0, 3),
        Segment(Modality.VIDEO, 3, 7),
        Segment(Modality.TEXT, 7, 9),
        Segment(Modality.VIDEO, 9, 13),
        Segment(Modality.TEXT, 13, 20),
        Segment(Modality.IMAGE, 20, 24),
        Segment(Modality.TEXT, 24, 26),
    )


def test_no_media_is_text():
    text = ModalityMap([Segment(Modality.TEXT, 0, 7)])
    assert map_from_mm_inputs(None, 7, QWEN_VL) == text
    assert map_from_mm_inputs(inputs(), 7, QWEN_VL) == text
    assert map_from_mm_inputs(None, 0, None) == ModalityMap([])
    assert cached_map(None, 7, None) == text


def test_audio_is_text():
    audio = item(SglModality.AUDIO, [(2, 5)])
    assert map_from_mm_inputs(inputs(audio), 8, QWEN_VL) == ModalityMap([Segment(Modality.TEXT, 0, 8)])


def test_a_one_frame_video_and_a_bare_grid_row():
    grid = map_from_mm_inputs(inputs(video([(1, 6)], [1, 4, 6])), 8, QWEN_VL).segments[1].grid
    assert (grid.frames, grid.rows, grid.cols, grid.frame_starts) == (1, 2, 3, (1,))


def test_media_may_touch_each_other_and_both_ends():
    mmap = map_from_mm_inputs(inputs(video([(0, 3)], [[1, 4, 4]]), image([(4, 7)], [[1, 4, 4]])), 8, QWEN_VL)
    assert [(s.modality, s.start, s.stop) for s in mmap.segments] == [("video", 0, 4), ("image", 4, 8)]


def test_a_missing_grid_leaves_the_modality():
    mmap = map_from_mm_inputs(inputs(video([(2, 5)])), 8, QWEN_VL)
    assert mmap.segments[1] == Segment(Modality.VIDEO, 2, 6)


@pytest.mark.parametrize(
    ("mm", "reason", "words"),
    [
        (inputs(image([(2, 9)], [[1, 4, 8]]), video([(8, 11)], [[1, 4, 4]])), "overlapping_offsets",
         r"mm_items\[1\] \(video\) span 0 at \[8, 11\]: overlaps mm_items\[0\] \(image\) span 0 at \[2, 9\]"),
        (inputs(video([(2, 5), (5, 8)], [[1, 4, 4]] * 2)), "overlapping_offsets", r"at \[5, 8\]: overlaps"),
        (inputs(video([(60, 67)], [[2, 4, 4]])), "out_of_range_offsets",
         r"mm_items\[0\] \(video\) span 0 at \[60, 67\]: expected tokens inside the prompt of 64 tokens"),
        (inputs(video([(64, 67)], [[1, 4, 4]])), "out_of_range_offsets", "inside the prompt of 64"),
        (inputs(video([(-1, 2)], [[1, 4, 4]])), "out_of_range_offsets", "expected a first token >= 0"),
        (inputs(video([(9, 8)], [[1, 4, 4]])), "empty_span", r"at \[9, 8\]: expected at least one token"),
        (inputs(video(None, [[1, 4, 4]])), "no_offsets", r"mm_items\[0\] \(video\): expected the offsets"),
        (inputs(video([], [[1, 4, 4]])), "no_offsets", "got none"),
        (inputs(video([(1, 2, 3)], [[1, 4, 4]])), "bad_offsets", r"\(first, last\) pairs"),
        (inputs(video([(0, 7)], [[2, 4, 6]])), "grid_mismatch",
         "expected 12 tokens for a grid of 2 x 4 x 6 before a 2 x 2 merge, got 8"),
        (inputs(video([(0, 7)], [[2, 4, 4], [2, 4, 4]])), "grid_mismatch", "got 2 for 1 spans"),
        (inputs(video([(0, 7), (9, 16)], [[2, 4, 4]])), "grid_mismatch", "got 1 for 2 spans"),
        (inputs(video([(0, 7)], [[2, 3, 4]])), "grid_mismatch", "divisible by the merge of 2, got 3 x 4"),
        (inputs(video([(0, 7)], [[2, 0, 4]])), "grid_mismatch", "got 0 x 4"),
        (inputs(video([(0, 7)], [[2, 4]])), "grid_mismatch", r"rows of \[t, h, w\]"),
        (inputs(video([(0, 7)], 7)), "grid_mismatch", r"rows of \[t, h, w\]"),
        (inputs(video([], [[0, 4, 4]])), "zero_frames", r"thw\[0\] has 0 frames, expected at least one"),
        (inputs(video([(5, 4)], [[0, 4, 4]])), "zero_frames", "0 frames"),
        (inputs(image([(0, 3)], [[1, 4, 4]], pre_chunked_input_ids=[1])), "moving_offsets", "EVS"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(mm, reason, words):
    with pytest.raises(GeometryError, match=words) as caught:
        map_from_mm_inputs(mm, 64, QWEN_VL)
    assert caught.value.reason == reason


def test_an_unknown_modality():
    smell = SimpleNamespace(modality=SimpleNamespace(name="SMELL"), offsets=[(0, 1)], model_specific_data={})
    with pytest.raises(GeometryError, match="got SMELL"):
        map_from_mm_inputs(SimpleNamespace(mm_items=[smell]), 4, None)


def test_families_of_real_configs():
    assert reader_of(Qwen2VLConfig()) == reader_of(Qwen2_5_VLConfig()) == QWEN_VL
    assert reader_of(Qwen2_5_VLConfig(vision_config={"spatial_merge_size": 3})) == GridReader(merge=3) != QWEN_VL
    assert reader_of(Qwen2Config()) is None


def test_chunks_share_one_map(monkeypatch):
    mm = inputs(video([(10, 25)], [[4, 4, 4]]))
    first = cached_map(mm, 40, QWEN_VL)
    assert first == map_from_mm_inputs(mm, 40, QWEN_VL)
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "map_from_mm_inputs", None)
        assert cached_map(mm, 40, QWEN_VL) is first
    assert cached_map(mm, 50, QWEN_VL).length == 50  # the next turn of a session, of text only


def test_a_changed_request_gets_a_new_map():
    mm = inputs(video([(10, 25)], [[4, 4, 4]]))
    first = cached_map(mm, 40, QWEN_VL)
    mm.mm_items[0].offsets = [(12, 27)]  # as SGLang's sessions do it
    second = cached_map(mm, 40, QWEN_VL)
    assert (first.segments[1].start, second.segments[1].start) == (10, 12)
    mm.merge(inputs(image([(30, 33)], [[1, 4, 4]])))
    assert len(cached_map(mm, 40, QWEN_VL).segments) == 5


def test_merging_does_not_hand_the_map_on():
    """SGLang's merge copies attributes with "_id" in their names to the other request."""
    kept = inputs(video([(10, 25)], [[4, 4, 4]]))
    cached_map(kept, 40, QWEN_VL)
    other = inputs(image([(0, 3)], [[1, 4, 4]]))
    other.merge(kept)
    assert set(vars(other)) == set(vars(inputs()))


def test_a_failure_is_kept_and_marked_as_repeated(monkeypatch):
    mm = inputs(video([(0, 7)], [[2, 4, 6]]))
    with pytest.raises(GeometryError) as first:
        cached_map(mm, 40, QWEN_VL)
    monkeypatch.setattr(geometry, "map_from_mm_inputs", None)
    for _ in range(2):
        with pytest.raises(GeometryError, match="expected 12 tokens") as again:
            cached_map(mm, 40, QWEN_VL)
        assert again.value.reason == "grid_mismatch"
        assert (first.value.repeated, again.value.repeated) == (False, True)


def test_long_prompts_cost_no_more_than_short_ones():
    """A million tokens in two segments: nothing in the map is as long as the prompt."""
    mm = inputs(video([(5, 5 + 250 * 4000 - 1)], [[4000, 20, 50]]))
    mmap = cached_map(mm, 1_100_000, QWEN_VL)
    assert len(mmap.segments) == 3 and mmap.segments[1].grid.frames == 4000
    assert "segment_ids" not in vars(mmap)

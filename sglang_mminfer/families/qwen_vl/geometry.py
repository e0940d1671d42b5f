"""Qwen2-VL and Qwen2.5-VL.

An image or a video is one span of placeholders. Its `*_grid_thw` row counts patches before the merger, frames
already folded in pairs, so the language model sees t * (h / merge) * (w / merge) tokens in raster order with
nothing between the frames. SGLang keeps several media of a prompt in one item when it cannot split them: K
offsets then, and K rows, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sglang_mminfer.modality.items import GeometryError, Span, data_of, grid_rows, spans_of
from sglang_mminfer.modality.segments import Modality, Segment, VisionGrid

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
MERGE = 2  # of every published checkpoint

_GRID_KEYS = {Modality.IMAGE: "image_grid_thw", Modality.VIDEO: "video_grid_thw"}


def argument_of(hf_config: Any) -> str:
    """The merge size, where a config has another one than every published checkpoint."""
    merge = int(getattr(getattr(hf_config, "vision_config", None), "spatial_merge_size", MERGE))
    return "" if merge == MERGE else str(merge)


def segments(item: Any, modality: Modality, name: str, argument: str) -> Iterator[tuple[Segment, str]]:
    """One segment with its grid for each image or video of the item.

    An item without a grid row (encoder-disaggregated serving sends embeddings only) keeps its modality and
    has no grid.

    Raises:
        GeometryError: "zero_frames" or "grid_mismatch", besides what the offsets themselves can be wrong in.
    """
    if data_of(item).get(_GRID_KEYS[modality]) is None:
        for span in spans_of(item, name):
            yield Segment(modality, span.start, span.stop), span.name
        return
    rasters = rasters_of(item, modality, name, argument)
    spans = spans_of(item, name)
    if len(rasters) != len(spans):
        raise GeometryError(
            "grid_mismatch",
            f"{name}: expected one row of {_GRID_KEYS[modality]} for each span, got {len(rasters)} for "
            f"{len(spans)} spans",
        )
    for span, raster in zip(spans, rasters):
        raster.check(span, raster.frames)
        starts = tuple(range(span.start, span.stop, raster.rows * raster.cols))
        yield Segment(modality, span.start, span.stop, VisionGrid(*raster[:3], starts)), span.name


class Raster(NamedTuple):
    """One `*_grid_thw` row in tokens of the language model, and the row itself."""

    frames: int
    rows: int
    cols: int
    thw: tuple[int, int, int]
    merge: int

    def check(self, span: Span, frames: int) -> None:
        """Raises GeometryError "grid_mismatch" if `span` is not as long as `frames` frames, or the grid is odd."""
        _, h, w = self.thw
        if h < self.merge or w < self.merge or h % self.merge or w % self.merge:
            raise GeometryError(
                "grid_mismatch",
                f"{span.name}: expected height and width divisible by the merge of {self.merge}, got {h} x {w}",
            )
        expected, tokens = frames * self.rows * self.cols, span.stop - span.start
        if expected != tokens:
            raise GeometryError(
                "grid_mismatch",
                f"{span.name}: expected {expected} tokens for a grid of {frames} x {h} x {w} before a "
                f"{self.merge} x {self.merge} merge, got {tokens}",
            )


def rasters_of(item: Any, modality: Modality, name: str, argument: str) -> list[Raster]:
    """The rasters of an item that has `*_grid_thw` rows, not yet held against its spans.

    Raises:
        GeometryError: "zero_frames" or "grid_mismatch".
    """
    merge = int(argument or MERGE)
    key = _GRID_KEYS[modality]
    value = data_of(item)[key]
    rows = grid_rows(value)
    if rows is None:
        raise GeometryError("grid_mismatch", f"{name}: expected rows of [t, h, w] in {key}, got {value!r:.80}")
    for i, (t, _, _) in enumerate(rows):
        # Before the offsets: a medium without frames has no tokens, so its offset is missing or empty too.
        if t < 1:
            raise GeometryError("zero_frames", f"{name}: {key}[{i}] has {t} frames, expected at least one")
    return [Raster(t, h // merge, w // merge, (t, h, w), merge) for t, h, w in rows]

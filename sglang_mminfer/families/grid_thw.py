"""Media whose rasters stand in `image_grid_thw` and `video_grid_thw`, as the processors of Qwen and GLM write them.

A row [t, h, w] counts patches before the merger, frames already folded in pairs, so the language model sees
t * (h / merge) * (w / merge) tokens in raster order. Families differ in what stands between the frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from sglang_mminfer.families.base import Family, LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, Span, data_of, grid_rows, one_segment, spans_of
from sglang_mminfer.modality.segments import Modality, Segment, VisionGrid

MERGE = 2  # in every published checkpoint

_GRID_KEYS = {Modality.IMAGE: "image_grid_thw", Modality.VIDEO: "video_grid_thw"}


def merge_of(hf_config: Any) -> int:
    """How many patches along a side the merger makes into one token."""
    return int(getattr(getattr(hf_config, "vision_config", None), "spatial_merge_size", MERGE))


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


@dataclass(frozen=True)
class GridReader(Reader):
    """One segment for each row, whose tokens are one span: an image, and a video with nothing between its frames.

    An item without a row (encoder-disaggregated serving sends embeddings only) keeps its modality and has no grid.
    SGLang keeps several media of a prompt in one item when it cannot split them: K offsets then, and K rows, in the
    same order.

    Attributes:
        merge: patches along a side that become one token.
    """

    merge: int = MERGE

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError: "zero_frames" or "grid_mismatch", or an error of `spans_of`."""
        key = _GRID_KEYS[one.modality]
        if data_of(one.item).get(key) is None:
            for span in spans_of(one.item, one.label):
                yield Segment(one.modality, span.start, span.stop), span.name
            return
        rasters = self.rasters(one)
        yield from self.placed(one, rasters, spans_of(one.item, one.label))

    def placed(self, one: MediaItem, rasters: Sequence[Raster], spans: Sequence[Span]) -> Iterator[LabelledSegment]:
        """The segments of an item that has rows and spans. Errors: as `of_item`."""
        if len(rasters) != len(spans):
            raise GeometryError(
                "grid_mismatch",
                f"{one.label}: expected one row of {_GRID_KEYS[one.modality]} for each span, got {len(rasters)} for "
                f"{len(spans)} spans",
            )
        for span, raster in zip(spans, rasters):
            raster.check(span, raster.frames)
            starts = tuple(range(span.start, span.stop, raster.rows * raster.cols))
            yield Segment(one.modality, span.start, span.stop, VisionGrid(*raster[:3], starts)), span.name

    def rasters(self, one: MediaItem) -> list[Raster]:
        """The rows of an item, not yet compared with its spans. Errors: as `of_item`."""
        key = _GRID_KEYS[one.modality]
        value = data_of(one.item)[key]
        rows = grid_rows(value)
        if rows is None:
            raise GeometryError("grid_mismatch", f"{one.label}: expected rows of [t, h, w] in {key}, got {value!r:.80}")
        for i, (t, _, _) in enumerate(rows):
            # Checked before the offsets: a medium without frames has no tokens, so its offset is missing or empty, too.
            if t < 1:
                raise GeometryError("zero_frames", f"{one.label}: {key}[{i}] has {t} frames, expected at least one")
        return [Raster(t, h // self.merge, w // self.merge, (t, h, w), self.merge) for t, h, w in rows]


@dataclass(frozen=True)
class FrameSpanReader(GridReader):
    """A `GridReader` of models whose videos have one span for each temporal patch.

    What stands between two of them (a timestamp of varying length as text, and tokens that begin and end a frame)
    belongs to the video and has no cell. What stands before the first and behind the last is text.
    """

    def placed(self, one: MediaItem, rasters: Sequence[Raster], spans: Sequence[Span]) -> Iterator[LabelledSegment]:
        if one.modality is not Modality.VIDEO:
            yield from super().placed(one, rasters, spans)
            return
        patches = sum(raster.frames for raster in rasters)
        if len(spans) != patches:
            raise GeometryError(
                "grid_mismatch",
                f"{one.label}: expected one span for each of {patches} temporal patches in video_grid_thw, got "
                f"{len(spans)}",
            )
        first = 0
        for raster in rasters:
            frames = list(spans[first : first + raster.frames])
            first += raster.frames
            for span in frames:
                raster.check(span, 1)
            yield one_segment(frames, raster.rows, raster.cols, one.modality)


class GridFamily(Family):
    """A family whose items have grid rows, and features with a row for each patch."""

    reader: ClassVar[type[GridReader]] = GridReader

    def geometry(self, hf_config: Any) -> Reader:
        return self.reader(merge_of(hf_config))

    def check_features(self, one: MediaItem, shape: tuple[int, ...], tokens: int, hf_config: Any) -> None:
        _check_patches(one, shape, hf_config)


def _check_patches(one: MediaItem, shape: tuple[int, ...], hf_config: Any) -> None:
    """Checks that the features of an item have a row for each patch of its grid.

    Raises:
        ValueError: naming the item, what it has and what was expected.
    """
    vision = hf_config.vision_config
    rows = _patches(one)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    if shape != (rows, width):
        raise ValueError(
            f"{one.label}: expected a feature of {rows} x {width}, a row for each patch of its grid, got "
            f"{' x '.join(map(str, shape))}"
        )


def _patches(one: MediaItem) -> int:
    """The number of patches in the grid rows of an item. Raises ValueError if it has no such rows."""
    import torch

    key = _GRID_KEYS[Modality.VIDEO if one.modality is Modality.VIDEO else Modality.IMAGE]
    grid = one.item.model_specific_data.get(key)
    if not isinstance(grid, torch.Tensor) or grid.is_floating_point() or grid.ndim != 2 or grid.shape[1] != 3:
        shape = getattr(grid, "shape", None)
        got = "none" if grid is None else type(grid).__name__ if shape is None else f"{grid.dtype} of {tuple(shape)}"
        raise ValueError(f"{one.label}: expected {key}, a tensor of integers with a row [t, h, w] for each, got {got}")
    return sum(int(t) * int(h) * int(w) for t, h, w in grid.tolist())

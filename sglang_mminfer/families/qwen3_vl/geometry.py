"""Qwen3-VL and Qwen3-VL-MoE.

A video is one span of placeholders for each temporal patch. Between two of them stand `<|vision_end|>`, a
timestamp of varying length as text, and `<|vision_start|>`: these tokens are members of the video without a
cell. The timestamp before the first patch and the `<|vision_end|>` after the last one are text. An image is one
span, as with the older Qwen models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_mminfer.families.qwen_vl import geometry as qwen_vl
from sglang_mminfer.families.qwen_vl.geometry import argument_of
from sglang_mminfer.modality.items import GeometryError, data_of, one_segment, spans_of
from sglang_mminfer.modality.segments import Modality, Segment

__all__ = ["MODEL_TYPES", "argument_of", "segments"]

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")


def segments(item: Any, modality: Modality, name: str, argument: str) -> Iterator[tuple[Segment, str]]:
    """One segment with its grid for each image or video of the item.

    Raises:
        GeometryError: "zero_frames" or "grid_mismatch", besides what the offsets themselves can be wrong in.
    """
    if modality is not Modality.VIDEO or data_of(item).get("video_grid_thw") is None:
        yield from qwen_vl.segments(item, modality, name, argument)
        return
    rasters = qwen_vl.rasters_of(item, modality, name, argument)
    spans = spans_of(item, name)
    patches = sum(raster.frames for raster in rasters)
    if len(spans) != patches:
        raise GeometryError(
            "grid_mismatch",
            f"{name}: expected one span for each of {patches} temporal patches in video_grid_thw, got {len(spans)}",
        )
    first = 0
    for raster in rasters:
        frames = spans[first : first + raster.frames]
        first += raster.frames
        for span in frames:
            raster.check(span, 1)
        yield one_segment(frames, raster.rows, raster.cols, modality)

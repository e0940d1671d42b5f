"""Qwen2-VL and Qwen2.5-VL.

An image or a video is one span of placeholders, with nothing between the frames.
"""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.base import Family, MediaItem, Reader
from sglang_mminfer.families.grid_thw import GridReader, check_patches, merge_of


class QwenVL(Family):
    """Qwen2-VL and Qwen2.5-VL."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    why = "A video is one raster of frames without anything between them, as its grid row says."
    processors = ("QwenVLImageProcessor",)

    def geometry(self, hf_config: Any) -> Reader:
        return GridReader(merge_of(hf_config))

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.model_type not in self.model_types:
            return None
        from sglang_mminfer.families.qwen_vl.processor import processor_class

        return processor_class(base)

    def model(self, base: type, architecture: str) -> type | None:
        from sglang_mminfer.families.qwen_vl import model

        return model.with_frames_apart(base) if model.is_mended(base) else None

    def check_features(self, one: MediaItem, shape: tuple[int, ...], tokens: int, hf_config: Any) -> None:
        check_patches(one, shape, hf_config)

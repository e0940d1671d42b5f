"""Qwen2-VL and Qwen2.5-VL.

An image or a video is one span of placeholders, with nothing between the frames.
"""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.grid_thw import GridFamily


class QwenVL(GridFamily):
    """Qwen2-VL and Qwen2.5-VL."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    why = "A video is one raster of frames without anything between them, as its grid row says."
    processors = ("QwenVLImageProcessor",)

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.model_type not in self.model_types:
            return None
        from sglang_mminfer.families.qwen_vl.processor import processor_class

        return processor_class(base)

    def model(self, base: type, architecture: str) -> type | None:
        from sglang_mminfer.families.qwen_vl import model

        return model.with_frames_apart(base) if model.is_mended(base) else None

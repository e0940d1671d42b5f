"""MiniCPM-V 4.6, whose vision encoder merges 4 x 4 patches into one token and keeps the raster."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.base import Family, Reader
from sglang_mminfer.families.minicpm_v.geometry import SliceReader


class MiniCPMV(Family):
    """MiniCPM-V 4.6."""

    model_types = ("minicpmv4_6",)
    why = "A picture or frame is a thumbnail and its slices, a span each, and each of them is an item."
    processors = ("MiniCPMV4_6MultimodalProcessor",)
    mend = "minicpm_v"

    def geometry(self, hf_config: Any) -> Reader:
        return SliceReader()

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.model_type not in self.model_types:
            return None
        from sglang_mminfer.families.minicpm_v.processor import processor_class

        return processor_class(base)

    def model(self, base: type, architecture: str) -> type | None:
        from sglang_mminfer.families.minicpm_v import model

        return model.handing_over_fields(base) if model.is_mended(base) else None

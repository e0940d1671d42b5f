"""NVILA and NVILA-Lite."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.base import Family, Reader
from sglang_mminfer.families.nvila.geometry import MERGED, TileReader, side_of


class NVILA(Family):
    """NVILA and NVILA-Lite."""

    model_types = tuple(MERGED)
    why = "Pictures and frames are tiles with line breaks between them, and nothing tells whose tile one is."
    processors = ("NVILAMultimodalProcessor",)
    mend = "nvila_videos"

    def geometry(self, hf_config: Any) -> Reader:
        return TileReader(side_of(hf_config))

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.model_type not in self.model_types:
            return None
        from sglang_mminfer.families.nvila.processor import processor_class

        return processor_class(base)

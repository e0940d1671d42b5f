"""LLaVA-OneVision and LLaVA-NeXT-Video in their Hugging Face form, served by SGLang's Transformers fallback."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.base import Family, Reader
from sglang_mminfer.families.llava_hf.geometry import NEXT_VIDEO, ONEVISION, reader_of


class LlavaHF(Family):
    """LLaVA-OneVision and LLaVA-NeXT-Video. They need no times of frames, which only transformers would read."""

    model_types = (ONEVISION, NEXT_VIDEO)
    why = "A picture is one tile and then its own resolution without padding, each row ended by a newline token."
    processors = ("TransformersAutoMultimodalProcessor",)
    mend = "llava_hf_videos"

    def geometry(self, hf_config: Any) -> Reader:
        return reader_of(hf_config)

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.model_type not in self.model_types:
            return None
        from sglang_mminfer.families.llava_hf.processor import processor_class

        return processor_class(base)

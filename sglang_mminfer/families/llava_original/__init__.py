"""LLaVA in the form of its original code (LLaVA-1.5, LLaVA-NeXT, lmms-lab's LLaVA-OneVision), pictures only.

A picture is one span of one or two rasters, each a segment. The first is the whole picture. There is a second if the
picture is the only one and may have any resolution: the picture in tiles, put together again without the padding. Each
row of the second raster ends with a newline token, which is the last column of its row. A newline token behind a
picture that is not cut belongs to the picture and has no cell.

The sizes of rasters follow from the vision tower, which the checkpoint only names. `processor` lays the prompt out and
writes the sizes into the item of each picture. A "llava" of another origin has no such sizes, and its spans have no
grid.
"""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.base import Family, Reader
from sglang_mminfer.families.generic import SpanReader

ARCHITECTURES = ("LlavaLlamaForCausalLM", "LlavaQwenForCausalLM", "LlavaMistralForCausalLM")


class LlavaOriginal(Family):
    """LLaVA in the form of its original code, pictures only."""

    model_types = ("llava",)
    why = "SGLang lays its prompts out in the scheduler, by a rule that is not always what its model then does."
    processors = ("LlavaImageProcessor",)
    mend = "llava_original"

    def geometry(self, hf_config: Any) -> Reader:
        return SpanReader()

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.architectures[0] not in ARCHITECTURES:
            return None
        from sglang_mminfer.families.llava_original.processor import processor_class

        return processor_class(base)

    def model(self, base: type, architecture: str) -> type | None:
        # The module is checked, too: a class of a user's plugin may have the name of one of these architectures.
        if architecture not in ARCHITECTURES or base.__module__ != "sglang.srt.models.llava":
            return None
        from sglang_mminfer.families.llava_original.processor import model_class

        return model_class(base)

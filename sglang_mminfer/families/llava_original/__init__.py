"""LLaVA in the form of its original code (LLaVA-1.5, LLaVA-NeXT, lmms-lab's LLaVA-OneVision), pictures only.

A picture is one span of one or two rasters, each a segment: the whole picture, then, where it alone is asked about
and may have any resolution, the picture in tiles put together again without the padding, whose rows end with a
newline token. That is the last column of its row; a newline token behind a picture that is not cut belongs to the
picture and has no cell.

How large they are follows from the vision tower, which the checkpoint only names: `processor`, which lays the prompt
out, says it of each picture. A "llava" of another origin says nothing, and its spans have no grid.
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
        # By its own module too: LLaVA-Video of ours has another name, but a user's plugin may not.
        if architecture not in ARCHITECTURES or base.__module__ != "sglang.srt.models.llava":
            return None
        from sglang_mminfer.families.llava_original.processor import model_class

        return model_class(base)

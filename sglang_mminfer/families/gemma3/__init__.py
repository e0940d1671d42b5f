"""Gemma 3.

A picture is `<start_of_image>`, a square of tokens, and `<end_of_image>`, whatever its size; pieces that the processor
may cut from a picture (pan and scan) are pictures of their own behind it. There is no video.

Five of six layers have a sliding window and stay dense. Gemma 3 was trained with tokens of a picture that see each
other. In SGLang only the Triton backend has that, as a mask of the model's own, and no pattern here has it, because
every pattern is causal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_mminfer.families.base import Family, LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, one_segment, spans_of

MASKED = "triton"
"""The backend of SGLang that lets tokens of a picture see each other."""


class Gemma3(Family):
    """Gemma 3 with pictures."""

    model_types = ("gemma3",)
    why = "A picture is a square of as many tokens as the config says; only the layers without a window can be sparse."
    processors = ("Gemma3SGLangImageProcessor",)

    def geometry(self, hf_config: Any) -> Reader:
        return SquareReader(math.isqrt(int(hf_config.mm_tokens_per_image)))

    def processor(self, base: type, hf_config: Any) -> type | None:
        if hf_config.model_type not in self.model_types:
            return None
        from sglang_mminfer.families.gemma3.processor import processor_class

        return processor_class(base)

    def note(self, dense_backend: str) -> str | None:
        if dense_backend == MASKED:
            return (
                f"Gemma 3 on {MASKED} lets tokens of a picture see each other, and every pattern is causal: prompts "
                "with pictures run dense (layer_custom_mask)."
            )
        return (
            f"Gemma 3 was made with tokens of a picture that see each other. SGLang's {dense_backend} does not have "
            "that, with mminfer or without, and lets each token see what is before it. For answers of the model as it "
            f"was made use --attention-backend {MASKED}."
        )


@dataclass(frozen=True)
class SquareReader(Reader):
    """One segment for each picture.

    Attributes:
        side: tokens along a side of a picture.
    """

    side: int

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError: "grid_mismatch", or an error of `spans_of`."""
        for span in spans_of(one.item, one.label):
            if span.stop - span.start != self.side**2:
                raise GeometryError(
                    "grid_mismatch",
                    f"{span.name}: expected {self.side} x {self.side} tokens, got {span.stop - span.start}",
                )
            yield one_segment([span], self.side, self.side, one.modality)

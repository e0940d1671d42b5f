"""Qwen3-VL and Qwen3-VL-MoE.

A video is one span of placeholders for each temporal patch. Between two of them stand `<|vision_end|>`, a
timestamp of varying length as text, and `<|vision_start|>`: these tokens are members of the video without a
cell. The timestamp before the first patch and the `<|vision_end|>` after the last one are text. An image is one
span, as with the older Qwen models, whose processor SGLang uses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from sglang_mminfer.families.grid_thw import FrameSpanReader, GridFamily
from sglang_mminfer.mends.token_ids import Piece


class Qwen3VL(GridFamily):
    """Qwen3-VL and Qwen3-VL-MoE."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    why = "A video is a span for each frame, with timestamps as text between them."
    processors = ("QwenVLImageProcessor",)
    reader = FrameSpanReader

    def processor(self, base: type, hf_config: Any) -> type | None:
        return _processor_class(base) if hf_config.model_type in self.model_types else None

    def model(self, base: type, architecture: str) -> type | None:
        from sglang_mminfer.families.qwen3_vl import model

        return model.with_videos_over_ranks(base) if model.is_mended(base) else None


@functools.cache
def _processor_class(base: Any) -> type:
    from sglang_mminfer.families.qwen_vl.processor import processor_class

    class MMInferQwen3VLProcessor(processor_class(base)):  # type: ignore[misc]
        """The processor of the older models, which also recognises frames with timestamps in the ids of an answer."""

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            return super().collapse_media(collapsed_frames(pieces, self._tokenizer), counts)

    return MMInferQwen3VLProcessor


_START, _VIDEO, _END = (Piece(name=f"<|{name}|>") for name in ("vision_start", "video_pad", "vision_end"))
_TIMESTAMP = re.compile(r"<\d+\.\d seconds>")


def collapsed_frames(pieces: Sequence[Piece], tokenizer: Any) -> list[Piece]:
    """The pieces of a prompt with one placeholder for each video of Qwen3-VL.

    A processor replaces `<|video_pad|>` by a timestamp and a frame between `<|vision_start|>` and `<|vision_end|>`, for
    each temporal patch. Pieces that do not look like that stay as they are.
    """
    out: list[Piece] = []
    at = 0
    while at < len(pieces):
        stop, frames = at, 0
        while (behind := _behind_frame(pieces, stop, tokenizer)) is not None:
            stop, frames = behind, frames + 1
        if frames and out[-1:] == [_START]:
            out.append(_VIDEO)
            at = stop
        else:
            out.append(pieces[at])
            at += 1
    return out


def _behind_frame(pieces: Sequence[Piece], at: int, tokenizer: Any) -> int | None:
    """The index of the piece behind a frame and its timestamp, if they begin at `at`; else None."""
    if at + 1 >= len(pieces) or not pieces[at].ids or pieces[at + 1] != _START:
        return None
    if not _TIMESTAMP.fullmatch(tokenizer.decode(pieces[at].ids)):
        return None
    stop = at + 2
    while pieces[stop : stop + 1] == [_VIDEO]:
        stop += 1
    return stop + 1 if stop > at + 2 and pieces[stop : stop + 1] == [_END] else None

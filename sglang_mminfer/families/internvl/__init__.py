"""InternVL in its native form (InternVLChatModel), up to 3.5."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.families.base import Family, MediaItem, Reader
from sglang_mminfer.families.internvl.geometry import TileReader, side_of


class InternVL(Family):
    """InternVL in its native form."""

    model_types = ("internvl_chat",)
    why = "Pictures and frames are tiles, a frame's number stands between frames, and frames of a video are items."
    processors = ("InternVLProcessor",)
    mend = "internvl_frames"

    def geometry(self, hf_config: Any) -> Reader:
        return TileReader(side_of(hf_config))

    def processor(self, base: type, hf_config: Any) -> type | None:
        from sglang_mminfer.families.internvl.processor import processor_class

        return processor_class(base)

    def check_features(self, one: MediaItem, shape: tuple[int, ...], tokens: int, hf_config: Any) -> None:
        side = side_of(hf_config)
        if len(shape) != 4 or shape[0] * side * side != tokens or shape[1] != 3 or shape[2] != shape[3]:
            raise ValueError(
                f"{one.label}: expected a feature of {tokens // side**2} x 3 x height x width, a tile for every "
                f"{side**2} tokens, got {' x '.join(map(str, shape))}"
            )

"""LongVILA's processor for SGLang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglang_mminfer.families.longvila.rasters import LongVilaRasters
from sglang_mminfer.families.own.processor import MediaProcessor
from sglang_mminfer.families.own.prompt import Medium


class LongVilaProcessor(MediaProcessor):
    """`--mm-process-config '{"video": {"num_frames": 256, "fps": 0}}'`."""

    VIDEO_OPTIONS: ClassVar[Mapping[str, type | tuple[type, ...]]] = {"num_frames": int, "fps": (int, float)}

    REQUEST_OPTIONS: ClassVar[Mapping[str, frozenset[str]]] = {
        "video": frozenset({"fps", "max_frames", "num_frames"}),
    }

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self.rasters = LongVilaRasters(hf_config, self.video_config)

    def image(self, picture: Any) -> Sequence[Medium]:
        return self.rasters.image(picture)

    def video(self, video: Any) -> Medium:
        return self.rasters.video(video)

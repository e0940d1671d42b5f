"""Qwen2.5-VL's vision encoder with the mend `frames_apart` over SGLang's class."""

from __future__ import annotations

import copy
import functools
from typing import Any

from sglang_mminfer import mends

_QWEN2_5_VL = "sglang.srt.models.qwen2_5_vl"


def is_mended(kind: type) -> bool:
    """Whether `kind` is SGLang's class of Qwen2.5-VL and the mend is on."""
    return mends.active("frames_apart") and kind.__module__ == _QWEN2_5_VL and hasattr(kind, "get_video_feature")


@functools.cache
def with_frames_apart(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class FramesApart(base):
        """Vision blocks with full attention see their frame and not the whole video, as in the model's training.

        Each temporal patch goes through the tower as a picture does. Nothing else depends on the number of frames.
        """

        def get_video_feature(self, items: list[Any]) -> Any:
            return super().get_video_feature([_frame_by_frame(item) for item in items])

    FramesApart.__name__ = FramesApart.__qualname__ = base.__name__  # SGLang asks for it by name
    return FramesApart


def _frame_by_frame(item: Any) -> Any:
    """A copy of a video with a grid row for each of its temporal patches."""
    import torch

    grids = torch.as_tensor(item.video_grid_thw)
    apart = grids.repeat_interleave(grids[:, 0], dim=0)
    apart[:, 0] = 1
    video = copy.copy(item)
    video.model_specific_data = {**item.model_specific_data, "video_grid_thw": apart}
    return video

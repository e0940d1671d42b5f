"""Qwen3-VL's vision encoder with the mend `video_over_ranks` over SGLang's class."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from sglang_mminfer import mends

_MODULES = ("sglang.srt.models.qwen3_vl", "sglang.srt.models.qwen3_5")


def is_mended(kind: type) -> bool:
    """Whether `kind` is SGLang's class of Qwen3-VL or Qwen3.5 and the mend is on."""
    return mends.active("video_over_ranks") and kind.__module__ in _MODULES and hasattr(kind, "_get_visual_feature")


@functools.cache
def with_videos_over_ranks(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class VideosOverRanks(base):
        """A DP vision encoder with clips of a video on all of its ranks.

        SGLang gives each medium to one rank. The tower takes every temporal patch by itself, so clips one behind the
        other have the embeddings of the whole video.
        """

        def _get_visual_feature(self, items: list[Any], grid_thw: Any) -> Any:
            import torch
            from sglang.srt.runtime_context import get_parallel

            ranks = get_parallel().attn_tp_size
            # A feature that is no tensor here lies on a device of another process, which counts who has read it.
            here = all(isinstance(item.feature, torch.Tensor) for item in items)
            if self.use_data_parallel and ranks > 1 and here and len(items) == len(grid_thw):
                items, grid_thw = in_clips(items, grid_thw, ranks)
            return super()._get_visual_feature(items, grid_thw)

    VideosOverRanks.__name__ = VideosOverRanks.__qualname__ = base.__name__  # SGLang asks for it by name
    return VideosOverRanks


def in_clips(items: list[Any], grid_thw: Any, parts: int) -> tuple[list[Any], Any]:
    """The items and their grid rows with each video as up to `parts` clips of about as many temporal patches.

    Args:
        items: one for each row, with a `feature` [t * h * w, D].
        grid_thw: int64 [items, 3]; t is 1 for pictures.
    """
    import torch

    clips = [clip for item, grid in zip(items, grid_thw.tolist(), strict=True) for clip in _clips(item, grid, parts)]
    return [item for item, _ in clips], torch.tensor([grid for _, grid in clips], dtype=grid_thw.dtype)


def _clips(item: Any, grid: list[int], parts: int) -> Iterator[tuple[Any, list[int]]]:
    frames, height, width = grid
    parts = min(parts, frames)
    stops = [frames * part // parts for part in range(parts + 1)]
    for start, stop in itertools.pairwise(stops):
        clip = copy.copy(item)
        clip.feature = item.feature[start * height * width : stop * height * width]
        yield clip, [stop - start, height, width]

"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and their relatives."""

from __future__ import annotations

import asyncio
import copy
import functools
import re
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.modality.geometry import grid_rows, qwen3_vl, qwen_vl

MODEL_TYPES = (*qwen_vl.MODEL_TYPES, *qwen3_vl.MODEL_TYPES)

_METADATA = "mminfer_video_metadata"
"""On what SGLang loads for a prompt: where the frames of each of its videos stand in their files."""

_PLACEHOLDERS = {"image": re.compile(r"(?:<\|image_pad\|>)+|<image>"), "video": re.compile(r"(?:<\|video_pad\|>)+")}


def adapted(base: type, hf_config: Any) -> type | None:
    return _class(base) if hf_config.model_type in MODEL_TYPES else None


@functools.cache
def _class(base: Any) -> type:
    class MMInferQwenVLProcessor(base):
        """Videos one by one, and their frames at their time."""

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            return {kind: len(pattern.findall(prompt)) for kind, pattern in _PLACEHOLDERS.items()}

        async def load_mm_data(self, *args: Any, **kwargs: Any) -> Any:
            loaded = await super().load_mm_data(*args, **kwargs)
            if not mends.active("video_seconds") or not loaded.videos or isinstance(loaded.videos[0], dict):
                return loaded
            loop = asyncio.get_running_loop()
            sampled = [await loop.run_in_executor(self.io_executor, self._sampled, video) for video in loaded.videos]
            # What is no decoder any more is taken as it is by the caller, which has nothing to say of its time then.
            loaded.videos = [frames for frames, _ in sampled]
            setattr(loaded, _METADATA, [metadata for _, metadata in sampled])
            return loaded

        def _sampled(self, video: Any) -> tuple[Any, dict[str, Any] | None]:
            """The frames that SGLang takes of a video, and where they stand in the file."""
            from sglang.srt.multimodal.processors.qwen_vl import preprocess_video

            options = {**self.video_config, **getattr(video, "mminfer_options", {})}
            return asyncio.run(preprocess_video(video, video_config=options))

        async def process_and_combine_mm_data_async(self, base_output: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = getattr(base_output, _METADATA, None)
            if metadata and all(metadata):
                from sglang.srt.multimodal.processors.qwen_vl import _get_processor_video_config

                # Without these transformers takes every video for one of 24 frames a second, and a Qwen2.5-VL for
                # twelve times shorter than it is.
                kwargs["video_metadata"], kwargs["do_sample_frames"] = metadata, False
                kwargs["processor_video_config"] = _get_processor_video_config(self.video_config, metadata)
            return await super().process_and_combine_mm_data_async(base_output, *args, **kwargs)

        def _postprocess_mm_items_before_transport(self, mm_items: list[Any], **kwargs: Any) -> list[Any]:
            items = super()._postprocess_mm_items_before_transport(mm_items, **kwargs)
            if not mends.active("separate_videos"):
                return items
            return [video for item in items for video in videos_of(item)]

    return MMInferQwenVLProcessor


def videos_of(item: Any) -> list[Any]:
    """The videos of an item that holds several with one span of tokens each; any other item as it is."""
    grids, count = grid_rows(item.model_specific_data.get("video_grid_thw")), len(item.offsets or ())
    if not item.is_video() or count < 2 or grids is None or len(grids) != count:
        return [item]
    patches = [t * h * w for t, h, w in grids]
    if getattr(item.feature, "ndim", 0) != 2 or len(item.feature) != sum(patches):
        return [item]
    videos, start = [], 0
    for i, length in enumerate(patches):
        video = copy.copy(item)
        video.feature = item.feature[start : start + length]
        video.offsets = [item.offsets[i]]
        video.model_specific_data = {
            key: value[i : i + 1] if _has_rows(value, count) else value
            for key, value in item.model_specific_data.items()
        }
        video.hash = None  # of all videos so far; SGLang computes it anew
        videos.append(video)
        start += length
    return videos


def _has_rows(value: Any, count: int) -> bool:
    """Whether a value holds something of each of `count` videos."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return len(shape) > 0 and shape[0] == count
    return isinstance(value, list | tuple) and len(value) == count

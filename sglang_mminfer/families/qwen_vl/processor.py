"""SGLang's processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, mended."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import math
import re
from typing import Any, ClassVar

from sglang_mminfer import mends
from sglang_mminfer.mends import limits, media_cache, options
from sglang_mminfer.mends.token_ids import Piece, collapsed
from sglang_mminfer.modality.items import grid_rows

_PIXELS = frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width"})
_BY_RATE, _BY_COUNT = frozenset({"fps", "min_frames", "max_frames"}), frozenset({"num_frames"})

METADATA = "mminfer_video_metadata"
"""Attribute of what SGLang loads for a prompt: for each video, where its frames stand in the file."""

_KINDS = {"<|image_pad|>": ("image",), "<|video_pad|>": ("video",)}

_SMALL = "mminfer_small_video"
"""Attribute of the same object: whether one of the videos may have fewer pixels than usual."""

_SMALLER = frozenset({"max_long_side_pixel", "min_pixels", "max_pixels", "total_pixels", *_PIXELS})

IMAGE_FACTOR = 28
"""Pixels along a side of the square that becomes one token, as SGLang counts for all of these models."""

_PLACEHOLDERS = {"image": re.compile(r"(?:<\|image_pad\|>)+|<image>"), "video": re.compile(r"(?:<\|video_pad\|>)+")}


@functools.cache
def processor_class(base: Any) -> Any:
    """SGLang's class `base` with the mends."""

    class MMInferQwenVLProcessor(base):
        """Each video is an item, its frames have their real times, and the request sets their number and size."""

        REQUEST_OPTIONS: ClassVar[dict[str, frozenset[str]]] = {
            "image": _PIXELS,
            "video": _PIXELS | _BY_RATE | _BY_COUNT | {"total_pixels"},
        }

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            return {kind: len(pattern.findall(prompt)) for kind, pattern in _PLACEHOLDERS.items()}

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces with one placeholder for each medium, if a client sent back the ids of an answer."""
            return collapsed(pieces, counts, _KINDS)

        async def load_mm_data(self, *args: Any, **kwargs: Any) -> Any:
            loaded = await super().load_mm_data(*args, **kwargs)
            loaded.images = [self._resized(image) for image in loaded.images or ()]
            if not mends.active("video_seconds") or not loaded.videos or isinstance(loaded.videos[0], dict):
                return loaded
            loop = asyncio.get_running_loop()
            sampled = [await loop.run_in_executor(self.io_executor, self._sampled, video) for video in loaded.videos]
            # Transformers would enlarge a video with fewer pixels than usual.
            setattr(loaded, _SMALL, any(options.on(video).keys() & _SMALLER for video in loaded.videos))
            # The caller takes frames as they are and knows no times for them, so the times are kept beside them.
            loaded.videos = [frames for frames, _ in sampled]
            setattr(loaded, METADATA, [metadata for _, metadata in sampled])
            return loaded

        async def _run_preprocess_and_build_artifact_batch(self, entries: Any) -> Any:
            resized = [dataclasses.replace(entry, media=self._resized(entry.media)) for entry in entries]
            return await super()._run_preprocess_and_build_artifact_batch(resized)

        def _resized(self, picture: Any) -> Any:
            """A picture in the size that its request asks for, resized as in Qwen's own code; else as it is."""
            wanted = options.on(picture)
            if not wanted.keys() & _PIXELS:
                return picture
            width, height = picture.size
            return picture.resize(self._size_of(wanted, height, width)[::-1])

        def _size_of(self, wanted: dict[str, Any], height: int, width: int) -> tuple[int, int]:
            """(height, width) of a picture in whole patches, as its request asks.

            Raises:
                ValueError: if the size is larger than the server takes, or one side is too long.
            """
            from sglang.srt.multimodal.processors.qwen_vl import smart_resize

            sizes: dict[str, int] = {name: wanted[name] for name in ("min_pixels", "max_pixels") if name in wanted}
            if sizes.get("min_pixels", 0) > sizes.get("max_pixels", math.inf):
                raise ValueError(f"min_pixels: expected no more than max_pixels, got {sizes}")
            height, width = wanted.get("resized_height", height), wanted.get("resized_width", width)
            patch = self.hf_config.vision_config.patch_size * self.spatial_merge_size
            height, width = smart_resize(height, width, factor=patch, **sizes)
            limits.check_size("image", width, height)
            return height, width

        def _sampled(self, video: Any) -> tuple[Any, dict[str, Any] | None]:
            """The frames that SGLang samples from a video, and where they stand in the file."""
            from sglang.srt.multimodal.processors.qwen_vl import preprocess_video

            config = self._video_options(options.on(video))
            if hasattr(video, "resized"):
                video, config = self._bounded(video, config)
            return asyncio.run(preprocess_video(video, video_config=config))

        def _video_options(self, wanted: dict[str, Any]) -> dict[str, Any]:
            """The options by which SGLang samples a video: the operator's, overridden by the request's."""
            config = dict(self.video_config)
            for one, other in ((_BY_RATE, {"nframes"}), (_BY_COUNT, _BY_RATE)):
                if wanted.keys() & one:
                    config = {name: value for name, value in config.items() if name not in other}
            for name in ("max_frames", "num_frames"):
                if name in wanted:
                    options.within(wanted[name], self.video_config.get("max_frames", 0), name)
            if "num_frames" in wanted:
                wanted["nframes"] = wanted.pop("num_frames")
            if wanted.pop("max_long_side_pixel", None):
                # Frames were made smaller already, and must stay so.
                wanted.setdefault("min_pixels", IMAGE_FACTOR**2)
            return {**config, **wanted}

        def _bounded(self, video: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            """The video, and the options by which SGLang then takes it; frames that are large, or may be kept for later
            turns, are resized as they are decoded, to the size that SGLang resizes them to.

            Raises:
                ValueError: for a file without a frame rate, or more frames than the server takes.
            """
            from sglang.srt.multimodal.processors import qwen_vl as stock

            if not video.avg_fps > 0:
                raise ValueError(f"video: expected a frame rate, got {video.avg_fps}")
            count = stock.smart_nframes(config, total_frames=len(video), video_fps=video.avg_fps)
            height, width = video.frame_shape
            if count * height * width * 3 <= limits.BATCH_BYTES and not media_cache.enabled():
                return video, config
            least = config.get("min_pixels", stock.VIDEO_MIN_PIXELS)
            share = config.get("total_pixels", stock.VIDEO_TOTAL_PIXELS) / count * stock.FRAME_FACTOR
            most = max(min(config.get("max_pixels", stock.VIDEO_MAX_PIXELS), share), int(least * 1.05))
            most = min(config.get("max_pixels", most), most)
            if "resized_height" in config and "resized_width" in config:
                size = stock.smart_resize(config["resized_height"], config["resized_width"])
            else:
                size = stock.smart_resize(height, width, min_pixels=least, max_pixels=most)
            if stock.smart_resize(*size) == size:  # its rule for sizes that are named
                config = {**config, "resized_height": size[0], "resized_width": size[1]}
            elif stock.smart_resize(*size, min_pixels=least, max_pixels=most) != size:
                return video, config  # it would resize what is resized
            return video.resized(*size), config

        async def process_and_combine_mm_data_async(self, base_output: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = getattr(base_output, METADATA, None)
            if metadata and all(metadata):
                from sglang.srt.multimodal.processors.qwen_vl import _get_processor_video_config

                # Without these, transformers assumes 24 frames a second, and a video of Qwen2.5-VL seems to run twelve
                # times too fast.
                kwargs["video_metadata"], kwargs["do_sample_frames"] = metadata, False
                kwargs["processor_video_config"] = _get_processor_video_config(self.video_config, metadata)
                if getattr(base_output, _SMALL, False):
                    most = self._processor.video_processor.size["longest_edge"]
                    size = {"shortest_edge": IMAGE_FACTOR**2, "longest_edge": most}
                    kwargs["processor_video_config"] = {**kwargs["processor_video_config"], "size": size}
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
        video.hash = None  # the hash of all videos together; SGLang computes a new one
        videos.append(video)
        start += length
    return videos


def _has_rows(value: Any, count: int) -> bool:
    """Whether a value has a row for each of `count` videos."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return len(shape) > 0 and shape[0] == count
    return isinstance(value, list | tuple) and len(value) == count

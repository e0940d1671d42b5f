"""Keeps what a video processor of transformers makes of the frames of a video, in the cache of media.

These processors cut and normalise each video of a prompt alone, and put the results one behind the other. On a GPU they
take no time worth saving, and what they make there is not kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_mminfer.mends import media_cache

ALONE = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "Glm4vVideoProcessor", "Glm46VVideoProcessor")
"""Classes of transformers whose result for several videos is that of each, in a row."""

_PATCHES, _GRIDS = "pixel_values_videos", "video_grid_thw"


def keep(processor: Any) -> None:
    """Lets a processor of transformers, SGLang's for a model, keep the features of videos."""
    video_processor: Any = getattr(processor, "video_processor", None)
    if type(video_processor).__name__ in ALONE and media_cache.enabled():
        kind: Any = type(video_processor)
        video_processor.__class__ = _keeping(kind)  # copies for other threads have it, too


@functools.cache
def _keeping(base: Any) -> type:
    class Keeping(base):
        """The class `base`, which makes features of a video once."""

        def _preprocess(self, videos: list[torch.Tensor], **settings: Any) -> Any:
            written = (
                f"{type(self).__name__} {self.to_json_string()} {sorted(settings.items(), key=lambda one: one[0])}"
            )
            if " at 0x" in written or any(video.device.type != "cpu" for video in videos):
                return super()._preprocess(videos=videos, **settings)
            original, cache = super()._preprocess, media_cache.of_process()

            def features(video: torch.Tensor) -> media_cache.Tensors:
                made = original(videos=[video], **settings)
                return made[_PATCHES], made[_GRIDS]

            keys = [(media_cache.FEATURES, written, *media_cache.content_of(video)) for video in videos]
            made = [cache.get(key, functools.partial(features, video)) for key, video in zip(keys, videos, strict=True)]
            patches, grids = map(torch.cat, zip(*made, strict=True))  # copies, of a single video too
            from transformers.feature_extraction_utils import BatchFeature

            return BatchFeature(data={_PATCHES: patches, _GRIDS: grids}, tensor_type=settings.get("return_tensors"))

    Keeping.__name__ = Keeping.__qualname__ = base.__name__  # transformers writes the name into settings
    return Keeping

"""Hugging Face LLaVA models, which SGLang serves through its Transformers fallback."""

from __future__ import annotations

import functools
from typing import Any

from sglang_mminfer.modality.geometry import llava_hf
from sglang_mminfer.models.frames import frames_at
from sglang_mminfer.processors import frames_wanted

NUM_FRAMES = 32
"""Of a video where nobody says how many. Stock takes all, each at its full size: an hour of video would fill any
memory."""


def adapted(base: type, hf_config: Any) -> type | None:
    """Only models that need no time of a frame, which transformers would have read from the file."""
    return _class(base) if hf_config.model_type in llava_hf.MODEL_TYPES else None


@functools.cache
def _class(base: Any) -> type:
    class MMInferLlavaProcessor(base):
        """The Transformers fallback with videos read by SGLang's own decoder, and any number of frames.

        By itself it has transformers fetch files, which knows no data: URL, needs torchcodec with FFmpeg's
        libraries, and takes every frame.
        """

        @functools.cached_property
        def num_frames(self) -> int:
            return frames_wanted(self.video_config) or NUM_FRAMES

        def check_options(self) -> None:
            _ = self.num_frames

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            tokens = {"image": self.mm_tokens.image_token, "video": self.mm_tokens.video_token}
            return {kind: prompt.count(token) for kind, token in tokens.items() if token}

        def _load_images(self, image_data: Any) -> list[Any]:
            from sglang.srt.managers.schedule_batch import Modality

            return [self._load_single_item(image, Modality.IMAGE) for image in image_data or ()]

        def _apply_hf_processor(self, text: str, images: Any = None, videos: Any = None) -> Any:
            if not videos:
                return super()._apply_hf_processor(text, images)
            arguments: dict[str, Any] = {"images": images} if images else {}
            arguments["videos"] = [self._frames(video) for video in videos]
            return self._processor(
                text=text, return_tensors="pt", videos_kwargs={"do_sample_frames": False}, **arguments
            )

        def _frames(self, video: Any) -> Any:
            """uint8 [frames, 3, height, width]."""
            import numpy as np
            import torch
            from sglang.srt.managers.schedule_batch import Modality

            decoder = self._load_single_item(video, Modality.VIDEO)
            # Exactly as many as asked for, of a shorter file some twice: transformers takes several videos in a
            # prompt only if they are of one length.
            indices = np.linspace(0, len(decoder) - 1, num=self.num_frames, dtype=int)
            frames = frames_at(decoder, indices.tolist(), f"{self.num_frames} frames")
            return torch.as_tensor(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)

    return MMInferLlavaProcessor

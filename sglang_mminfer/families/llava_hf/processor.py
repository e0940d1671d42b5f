"""SGLang's processor of the Hugging Face LLaVA models, mended."""

from __future__ import annotations

import functools
from typing import Any

from sglang_mminfer.families.counted_frames import count_for, counting_frames
from sglang_mminfer.families.frames import frames_at
from sglang_mminfer.mends import limits

NUM_FRAMES = 32
"""Frames of a video if neither request nor operator sets their number. Stock SGLang takes all frames, each at its full
size: an hour of video would fill any memory."""


@functools.cache
def processor_class(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class MMInferLlavaProcessor(counting_frames(base, NUM_FRAMES)):  # type: ignore[misc]
        """The Transformers fallback with videos read by SGLang's own decoder, and any number of frames.

        In stock SGLang transformers fetches the files: it knows no data: URL, needs torchcodec with FFmpeg's libraries,
        and takes every frame.
        """

        def _load_images(self, image_data: Any) -> list[Any]:
            from sglang.srt.managers.schedule_batch import Modality

            images = [self._load_single_item(image, Modality.IMAGE) for image in image_data or ()]
            # Only LLaVA 1.5 among these models puts a picture into a square before it is made smaller.
            pads = getattr(self._processor.image_processor, "do_pad", False) is True
            if pads and self.hf_config.model_type == "llava":
                for image in images:
                    limits.check_square(*(image.size if hasattr(image, "convert") else image.shape[:-3:-1]))
            return images

        def _apply_hf_processor(self, text: str, images: Any = None, videos: Any = None) -> Any:
            if not videos:
                return super()._apply_hf_processor(text, images)
            arguments: dict[str, Any] = {"images": images} if images else {}
            arguments["videos"] = films = [self._frames(video) for video in videos]
            if len({len(film) for film in films}) > 1:
                raise ValueError(
                    f"video: this model takes equally many frames of all videos of a prompt, got "
                    f"{', '.join(str(len(film)) for film in films)}: give num_frames for each"
                )
            return self._processor(
                text=text, return_tensors="pt", videos_kwargs={"do_sample_frames": False}, **arguments
            )

        def _frames(self, video: Any) -> Any:
            """uint8 [frames, 3, height, width]."""
            import numpy as np
            import torch
            from sglang.srt.managers.schedule_batch import Modality

            try:
                decoder = self._load_single_item(video, Modality.VIDEO)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"video: expected a path or URL of a video file: {error}") from error
            # Exactly as many frames as asked for; a shorter file gives some twice. Transformers takes several videos in
            # a prompt only if they have the same number of frames.
            count = count_for(decoder, self.num_frames)
            indices = np.linspace(0, len(decoder) - 1, num=count, dtype=int)
            frames = frames_at(decoder, indices.tolist(), f"{count} frames")
            return torch.as_tensor(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)

    return MMInferLlavaProcessor

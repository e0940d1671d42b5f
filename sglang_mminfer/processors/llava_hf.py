"""Hugging Face LLaVA models, which SGLang serves through its Transformers fallback."""

from __future__ import annotations

import functools
from typing import Any

from sglang_mminfer.modality.geometry import llava_hf
from sglang_mminfer.processors import frames_wanted


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

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.num_frames = frames_wanted(self.video_config)

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
            from sglang.srt.utils import load_video

            source = getattr(video, "url", video)
            try:
                decoder = load_video(source, use_gpu=False)
            except Exception as error:
                shown = str(source)[:200] if isinstance(source, str) else type(source).__name__
                raise ValueError(f"video: expected a path or URL of a video file, got {shown}: {error}") from error
            # Exactly as many as asked for, of a shorter file some twice: transformers takes several videos in a
            # prompt only if they are of one length.
            indices = np.linspace(0, len(decoder) - 1, num=self.num_frames or len(decoder), dtype=int)
            return decoder.get_frames_as_tensor(indices.tolist()).permute(0, 3, 1, 2)

    return MMInferLlavaProcessor

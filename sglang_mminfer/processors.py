"""SGLang's media processors of models whose limits or mistakes stand in the way of long video.

Each class here is SGLang's own with little changed, made when SGLang asks for the processor of such a model and
not before: `adapt` is the hook, `plugin.HOOKS` says why. The number of frames is SGLang's own option for video,
which these processors do not read:

    --mm-process-config '{"video": {"num_frames": 256}}'
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

NUM_FRAMES = "num_frames"


def adapt(kind: type | None, *args: Any, **kwargs: Any) -> type | None:
    """AFTER get_mm_processor_cls: our class in place of one that `_ADAPTED` names, else None (SGLang's stays)."""
    from sglang_mminfer.plugin import adapts_media

    if kind is None or not adapts_media():
        return None
    adapted = _ADAPTED.get(kind.__name__)
    return adapted(kind, args[0] if args else kwargs["hf_config"]) if adapted is not None else None


def frames_wanted(video_config: dict[str, Any]) -> int | None:
    """`num_frames` of --mm-process-config's video, None if it is not there.

    Raises:
        ValueError: if it is no positive integer.
    """
    wanted = video_config.get(NUM_FRAMES)
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"--mm-process-config: video: {NUM_FRAMES}: expected an integer >= 1, got {wanted!r}")
    return wanted


@functools.cache
def _internvl_class(base: Any) -> type:
    class MMInferInternVLProcessor(base):
        """InternVL with any number of frames, one item for each frame in the order of the prompt."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.num_frames = frames_wanted(self.video_config)

        async def process_qwen_mm_data_async(
            self, image_data: Any, input_text: Any, request_obj: Any, **kwargs: Any
        ) -> Any:
            if self.num_frames is not None:
                kwargs.setdefault("video_num_frames", self.num_frames)
            # SGLang's chat template writes images as the one, its processor counts the other: it would add a
            # second placeholder for each image, and leave it in the prompt as text.
            prompt = (input_text or "").replace(self.IMG_CONTEXT, self.IMAGE_PLACEHOLDER_TOKEN)
            output = await super().process_qwen_mm_data_async(
                image_data=image_data, input_text=prompt, request_obj=request_obj, **kwargs
            )
            if output is not None:
                videos = len(getattr(request_obj, "video_data", None) or ())
                items = [part for item in output.mm_items for part in _frames_of(item, videos)]
                output.mm_items = sorted(items, key=lambda item: item.offsets[0])
            return output

    return MMInferInternVLProcessor


def _frames_of(item: Any, videos: int) -> Iterator[Any]:
    """An item for each frame of an item that holds all frames of `videos` videos; any other item as it is.

    SGLang samples all videos of a prompt to the same number of frames, and each frame is a span of tokens and a
    row of the feature.
    """
    from sglang_mminfer.modality.geometry import VIDEO_KEY  # not at the top: every process of SGLang imports this file

    count = len(item.offsets or ())
    if not item.is_video() or not videos or count % videos or len(item.feature) != count:
        yield item
        return
    for i, offset in enumerate(item.offsets):
        frame = copy.copy(item)
        frame.feature = item.feature[i : i + 1]
        frame.offsets = [offset]
        frame.model_specific_data = {**item.model_specific_data, VIDEO_KEY: i // (count // videos)}
        frame.hash = None
        yield frame


@functools.cache
def _llava_class(base: Any) -> type:
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


def _internvl(base: Any, hf_config: Any) -> type:
    return _internvl_class(base)


def _fallback(base: Any, hf_config: Any) -> type | None:
    """Only models that need no time of a frame, which transformers would have read from the file."""
    from sglang_mminfer.modality.geometry import llava_hf

    return _llava_class(base) if hf_config.model_type in llava_hf.MODEL_TYPES else None


def _original_llava(base: Any, hf_config: Any) -> type | None:
    from sglang_mminfer import original_llava

    return original_llava.adapt_processor(base, hf_config)


_ADAPTED: dict[str, Callable[[Any, Any], type | None]] = {
    "InternVLProcessor": _internvl,
    "LlavaImageProcessor": _original_llava,
    "TransformersAutoMultimodalProcessor": _fallback,
}

"""Videos in every form that clients send, within bounds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_mminfer import mends
from sglang_mminfer.mends import limits, options, pictures

if TYPE_CHECKING:
    import numpy as np

FPS = 1.0
"""Frames per second of single frames that come without a rate."""

_FRAMES_URL = "data:video/jpeg;base64,"
"""How vLLM's clients send frames: this prefix, then the base64 of each frame, separated by commas."""

ACCEPTED = (
    "a video is a file, a URL, base64 of a file, data:video/jpeg;base64,FRAME,FRAME,..., or a list of frames of one "
    "size (base64, data: URLs, paths, PIL images, arrays), or an array of uint8 [frames, height, width, 3]"
)


def load(
    original: Callable[..., Any],
    family: Any,
    data: Any,
    modality: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replaces BaseMultimodalProcessor._load_single_item for a video.

    Args:
        original: SGLang's method.
        family: the processor's class.
        data, modality: as for SGLang's method.

    Returns:
        A decoder with SGLang's interface; or what `original` returns, if that is no decoder.

    Raises:
        ValueError: if it is no video, or larger than `limits` allow.
    """
    source, request_options = options.of(_as_list(data), family, "video")
    if mends.active("video_frames") and (frames := frames_in(source)) is not None:
        # With frames, fps is the rate at which they were taken, as in vLLM and in Qwen's own service.
        video = as_video(frames, request_options.pop("fps", FPS))
    else:
        passed_on = source if hasattr(family, "REQUEST_OPTIONS") or isinstance(data, dict) else data
        video = original(passed_on, modality, *args, **kwargs)
    if not hasattr(video, "get_frames_as_tensor"):
        return video
    if mends.active("odd_sizes") or request_options.get("max_long_side_pixel"):
        video = _bounded(video, request_options.get("max_long_side_pixel"))
    if request_options:
        setattr(video, options.ATTRIBUTE, request_options)
    return video


def as_video(frames: Sequence[Any], fps: float) -> Any:
    """A decoder with SGLang's interface over single frames.

    Args:
        frames: uint8 [frames, height, width, 3], or a sequence of pictures in the forms that `ACCEPTED` lists.
        fps: frames per second.

    Raises:
        ValueError: if there are no frames or too many, if one is no picture, or if their sizes differ.
    """
    from sglang_mminfer.mends.decoders import Frames

    if not 0 < len(frames) <= limits.FRAMES_GIVEN:
        raise ValueError(f"video: expected 1 to {limits.FRAMES_GIVEN} frames, got {len(frames)}")
    if _is_array(frames):
        pixels = _channels_last(frames)
        return Frames(pixels, lambda frame: frame, pixels.shape[1:3], fps)
    sizes = [_size(frame, i) for i, frame in enumerate(frames)]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"video: expected frames of one size, got {sizes[0][1]} x {sizes[0][0]} and, as number {i + 1}, "
                f"{size[1]} x {size[0]}"
            )
    return Frames(frames, _read, sizes[0], fps)


def _bounded(video: Any, longest: int | None) -> Any:
    """The video after a check of its first frame's size, with smaller frames if `longest` asks for them."""
    from sglang_mminfer.mends.decoders import Bounded, shrunk

    bounded = Bounded(video)
    if len(bounded) < 1:
        raise ValueError("video: expected at least one frame, found none")
    if not math.isfinite(bounded.avg_fps):
        raise ValueError(f"video: expected a frame rate, got {bounded.avg_fps}")
    try:
        height, width = bounded.whole
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each decoder raises errors of its own
        raise ValueError(
            f"video: its first frame cannot be decoded: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    limits.check_size("video", width, height)
    return shrunk(bounded, longest) if longest else bounded


def _as_list(data: Any) -> Any:
    return list(data) if isinstance(data, tuple) else data


def frames_in(source: Any) -> Sequence[Any] | None:
    """The frames of a video that came as single frames or as an array; None for a file.

    Raises:
        ValueError: for an array that is no video.
    """
    if _is_array(source):
        return source
    if isinstance(source, list | tuple):
        return source
    if isinstance(source, str) and source[: len(_FRAMES_URL)].lower() == _FRAMES_URL:
        return source[len(_FRAMES_URL) :].split(",")
    return None


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _channels_last(frames: Any) -> Any:
    """uint8 [frames, height, width, 3] from an array or tensor with its channels last or second.

    Raises:
        ValueError: for any other shape or type.
    """
    import numpy as np

    array = frames.detach().cpu().numpy() if hasattr(frames, "detach") else np.asarray(frames)
    if array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not array.size:
        raise ValueError(f"video: got {array.dtype} {list(array.shape)}; {ACCEPTED}")
    if mends.active("odd_sizes"):
        limits.check_size("video", array.shape[2], array.shape[1])
    return array


def _size(frame: Any, index: int) -> tuple[int, int]:
    """(height, width) of one frame as it is shown; only the header of a file is read."""
    if _is_array(frame):
        height, width = _picture_of(frame).shape[:2]
        return height, width
    picture = _opened(frame, index)
    if mends.active("odd_sizes"):
        limits.check_size("video", *picture.size)
    turned = mends.active("picture_orientation") and pictures.orientation(picture) >= 5
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def _read(frame: Any) -> np.ndarray:
    """uint8 [height, width, 3]: one frame, decoded."""
    import numpy as np

    if _is_array(frame):
        return _picture_of(frame)
    return np.asarray(pictures.shown(_opened(frame), {}))


def _picture_of(frame: Any) -> np.ndarray:
    return _channels_last(frame[None])[0]


def _opened(frame: Any, index: int | None = None) -> Any:
    from PIL import Image

    if isinstance(frame, Image.Image):
        return frame
    if isinstance(frame, dict) and len(frame) == 1:
        frame = next(iter(frame.values()))
    where = "" if index is None else f" (frame {index + 1})"
    if not isinstance(frame, str | bytes):
        raise ValueError(f"video: got a frame of type {type(frame).__name__}{where}; {ACCEPTED}")
    if isinstance(frame, str) and len(frame) < 4096 and os.path.isfile(frame):
        frame = f"file://{os.path.abspath(frame)}"
    try:
        return pictures.opened(frame)
    except ValueError as error:
        raise ValueError(f"video: {error}{where}; {ACCEPTED}") from error

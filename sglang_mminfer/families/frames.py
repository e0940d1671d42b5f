"""Frames out of video files, resized as the models' own preprocessing does it, as uint8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sglang_mminfer.mends import limits

MEAN = 0.5
"""The mean of pixel values from 0 to 1 by which these models normalise every channel."""

BATCH = 32
"""How many frames are decoded at a time; fewer if they are large, so that they do not fill the memory."""


def resize(picture: Image.Image, width: int, height: int) -> torch.Tensor:
    """The picture resized by bicubic interpolation of 8-bit values: uint8 [3, height, width]."""
    pixels = np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def squared(picture: Image.Image) -> Image.Image:
    """The picture in a square with a border of the mean colour, so that a model that sees squares does not stretch it.

    Raises:
        ValueError: if the square would be larger than a picture may be.
    """
    return in_square(picture, (int(MEAN * 255),) * 3)


def in_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of one colour.

    Raises:
        ValueError: if the square would be larger than a picture may be.
    """
    limits.check_square(*picture.size)
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def length_and_rate(video: Any) -> tuple[int, float]:
    """The number of frames, and frames per second (0 if unknown), of a video as SGLang loads it.

    Args:
        video: a decoder, or the frames themselves, which count as one a second.
    """
    if hasattr(video, "get_frames_at"):
        return len(video), float(video.avg_fps or 0)
    return len(video), 1.0


def decode(
    video: Any, indices: Sequence[int], width: int, height: int, *, bordered: bool = False
) -> list[torch.Tensor]:
    """The frames at `indices`, each uint8 [3, height, width]; an index that repeats gives the same tensor again.

    Args:
        video: SGLang's decoder, or the frames themselves.
        bordered: put frames into a square with a border before they are resized.

    Raises:
        ValueError: if the file breaks off or cannot be decoded.
    """
    wanted = sorted(set(indices))
    frames: dict[int, torch.Tensor] = {}
    batch = _batch(video)
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        pictures = frames_at(video, part, f"frames {part[0]} to {part[-1]}")
        if len(pictures) != len(part):
            raise ValueError(f"video: expected {len(part)} frames from {part[0]} on, got {len(pictures)}")
        for index, picture in zip(part, pictures):
            image = _as_image(picture)
            frames[index] = resize(squared(image) if bordered else image, width, height)
    return [frames[i] for i in indices]


def _batch(video: Any) -> int:
    if not hasattr(video, "frame_shape"):
        return BATCH
    height, width = video.frame_shape
    return limits.batch_of(width, height, BATCH)


def frames_at(video: Any, indices: Sequence[int], named: str) -> Sequence[Any]:
    """The frames at `indices`, as SGLang's decoder returns them, or from the frames themselves.

    Args:
        named: what an error calls the frames.

    Raises:
        ValueError: if the file breaks off or cannot be decoded.
    """
    try:
        return video.get_frames_at(indices) if hasattr(video, "get_frames_at") else [video[i] for i in indices]
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each decoder raises errors of its own
        raise ValueError(f"video: {named} of {len(video)} cannot be decoded: {error}") from error


def _as_image(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    array = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"video: expected frames of 3 channels in uint8, got {array.dtype} {array.shape}")
    return Image.fromarray(array)

"""Frames out of video files, resized as the models' own preprocessing does it, as uint8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH = 32
"""Frames that are decoded at a time, so that a long video of large frames does not fill the memory."""


def resize(picture: Image.Image, width: int, height: int) -> torch.Tensor:
    """uint8 [3, height, width], by bicubic interpolation on 8-bit values."""
    pixels = np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def length_and_rate(video: Any) -> tuple[int, float]:
    """Frames and frames a second of what SGLang makes of a video: a decoder, or the frames themselves."""
    if hasattr(video, "get_frames_at"):
        return len(video), float(video.avg_fps or 0)
    return len(video), 1.0


def decode(video: Any, indices: Sequence[int], width: int, height: int) -> list[torch.Tensor]:
    """The frames of the given indices, each uint8 [3, height, width]; the same tensor where an index repeats.

    Raises:
        ValueError: if the file breaks off or cannot be decoded.
    """
    wanted = sorted(set(indices))
    frames: dict[int, torch.Tensor] = {}
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        try:
            pictures = video.get_frames_at(part) if hasattr(video, "get_frames_at") else [video[i] for i in part]
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # each decoder has errors of its own
            raise ValueError(
                f"video: frames {part[0]} to {part[-1]} of {len(video)} cannot be decoded: {error}"
            ) from error
        if len(pictures) != len(part):
            raise ValueError(f"video: expected {len(part)} frames from {part[0]} on, got {len(pictures)}")
        for index, picture in zip(part, pictures):
            frames[index] = resize(_as_image(picture), width, height)
    return [frames[i] for i in indices]


def _as_image(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    array = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"video: expected frames of 3 channels in uint8, got {array.dtype} {array.shape}")
    return Image.fromarray(array)

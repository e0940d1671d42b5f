"""Which frames of a video a Qwen-VL model is shown, at which size and which time: `qwen_vl_utils`, for the oracle.

Where SGLang differs from `qwen_vl_utils`, this module does as SGLang does: a position between two frames is cut to
the earlier frame (`qwen_vl_utils` rounds); frames are resized with a bilinear kernel (`qwen_vl_utils`: bicubic), and
to multiples of 28 pixels also for Qwen3-VL, whose processor then makes them multiples of 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sglang_mminfer.testing.oracle_media import Video

OPTIONS = frozenset(
    (
        *("fps", "nframes", "min_frames", "max_frames"),
        *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    )
)
"""The options of --mm-process-config's "video" that this module heeds; the processor heeds the others."""

SIDE = 28
"""Height and width of a frame are multiples of this, in pixels."""
LEAST_PIXELS, MOST_PIXELS = 128 * SIDE**2, 768 * SIDE**2
"""Bounds on the pixels of a frame."""
ALL_PIXELS = int(128_000 * SIDE**2 * 0.9)
"""Bound on the pixels of a video, which counts one frame of each pair."""
FPS, LEAST_FRAMES, MOST_FRAMES = 2.0, 4, 768


@dataclass(frozen=True)
class Sampled:
    """The frames of a video that the model is shown, and what the file says about time."""

    frames: torch.Tensor
    """uint8 [frames, 3, height, width]"""
    indices: list[int]
    """The number of each frame in the file."""
    total: int
    """How many frames the file has."""
    fps: float
    """The file's frames per second."""

    @property
    def sampled_fps(self) -> float:
        """Frames per second of the frames that were taken."""
        return len(self.indices) / self.total * self.fps

    @property
    def metadata(self) -> dict[str, Any]:
        """The `video_metadata` of a transformers processor."""
        return {"total_num_frames": self.total, "fps": self.fps, "frames_indices": self.indices}


def sample(video: Video, options: Mapping[str, Any]) -> Sampled:
    """The frames that are taken of a video, under --mm-process-config's options for "video".

    Raises:
        ValueError: fewer than two frames would be taken.
    """
    total = len(video)
    count = frames_taken(total, video.fps, options)
    indices = [int(i) for i in np.linspace(0, total - 1, count)]
    frames = torch.from_numpy(video.frames(indices)).permute(0, 3, 1, 2)
    return Sampled(resized(frames, options), indices, total, video.fps)


def frames_taken(total: int, fps: float, options: Mapping[str, Any]) -> int:
    """How many of `total` frames are taken; always an even number.

    Raises:
        ValueError: that number is less than two, or more than `total`.
    """
    if "nframes" in options:
        count = 2 * round(options["nframes"] / 2)
    else:
        least = 2 * math.ceil(options.get("min_frames", LEAST_FRAMES) / 2)
        most = 2 * math.floor(options.get("max_frames", min(MOST_FRAMES, total)) / 2)
        target = min(max(total / fps * options.get("fps", FPS), least), most, total)
        count = 2 * math.floor(target / 2)
    if not 2 <= count <= total:
        raise ValueError(f"video: expected 2 to {total} frames, got {count}")
    return count


def resized(frames: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """Frames, uint8 [frames, 3, height, width], resized to the size at which the processor gets them."""
    from torchvision.transforms import InterpolationMode, functional

    count, _, height, width = frames.shape
    if "resized_height" in options and "resized_width" in options:
        height, width = options["resized_height"], options["resized_width"]
        # SGLang's bounds for a picture apply here.
        size = fitted(height, width, 4 * SIDE**2, 12_845_056)
    else:
        least = options.get("min_pixels", LEAST_PIXELS)
        share = options.get("total_pixels", ALL_PIXELS) / count * 2
        most = max(min(options.get("max_pixels", MOST_PIXELS), share), int(1.05 * least))
        size = fitted(height, width, least, min(options.get("max_pixels", most), most))
    return functional.resize(frames, list(size), interpolation=InterpolationMode.BILINEAR)


def fitted(height: int, width: int, least: float, most: float) -> tuple[int, int]:
    """Height and width as multiples of SIDE, near the given proportions, with `least` to `most` pixels."""
    rows, columns = max(1, round(height / SIDE)), max(1, round(width / SIDE))
    pixels = rows * columns * SIDE**2
    if pixels > most:
        scale = math.sqrt(height * width / most)
        rows, columns = math.floor(height / scale / SIDE), math.floor(width / scale / SIDE)
    elif pixels < least:
        scale = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * scale / SIDE), math.ceil(width * scale / SIDE)
    return rows * SIDE, columns * SIDE

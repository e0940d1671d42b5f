"""Which frames of a video a model gets to see: each family's own rule, on numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampled:
    """Frames of a video.

    Attributes:
        indices: the numbers of the frames in the file, ascending; a number may come twice.
        seconds: the time of each frame, as the model is told.
        duration: the length of the whole video, in seconds.
    """

    indices: list[int]
    seconds: list[float]
    duration: float


def check(total: int, rate: float) -> float:
    """The frame rate to use, in frames per second. A file without a rate (one frame may have none) lasts a second.

    Raises:
        ValueError: if the video has no frames.
    """
    if total < 1:
        raise ValueError("video: expected at least one frame, found none")
    return rate if np.isfinite(rate) and rate > 0 else float(total)


def every_second(total: int, rate: float, *, fps: float, most: int, forced: bool) -> Sampled:
    """LLaVA-Video: `fps` frames a second. If there would be more than `most`, or if `forced`, `most` frames evenly.

    Args:
        total, rate: frames of the file, and frames per second.
        forced: always take exactly `most` frames, some of them repeatedly if the video has fewer.
    """
    rate = check(total, rate)
    step = max(1, round(min(rate / fps, total)))
    if -(-total // step) <= most and not forced:
        # In training, at one frame a second, the model was told the number of a frame as its time.
        indices = list(range(0, total, step))
        return Sampled(indices, [i / step / fps for i in indices], total / rate)
    indices = np.linspace(0, total - 1, most, dtype=int).tolist()
    return Sampled(indices, [i / rate for i in indices], total / rate)


def first_seconds(total: int, rate: float, *, fps: float, most: int) -> Sampled:
    """VILA with a frame rate: `fps` frames a second from the start, no more than `most`."""
    rate = check(total, rate)
    # A file may claim any length, so no more times are computed than frames are wanted.
    seconds = np.arange(0, total / rate, 1.0 / fps) if total / rate * fps < most else np.arange(most) * (1.0 / fps)
    seconds = seconds[:most]
    indices = [min(int(t * rate), total - 1) for t in seconds]
    return Sampled(indices, seconds.tolist(), total / rate)


def evenly(total: int, rate: float, *, count: int) -> Sampled:
    """VILA without a frame rate: `count` frames from the first to the last."""
    rate = check(total, rate)
    indices = np.round(np.linspace(0, total - 1, count)).astype(int).tolist()
    return Sampled(indices, [i / rate for i in indices], total / rate)


STEP = 0.1
"""Seconds between the places from which `each_second` chooses frames of a long video."""


def each_second(total: int, rate: float, *, most: int) -> Sampled:
    """MiniCPM-V 4.6: the first frame of each second. A video that lasts more than `most` seconds gives `most`
    frames evenly, each of them at a tenth of a second."""
    rate = check(total, rate)
    duration = total / rate
    if duration > most:
        tenths = np.linspace(0, int(duration / STEP) - 1, most, dtype=int)
        seconds = [round(int(tenth) * STEP, 1) for tenth in tenths]
    else:
        seconds = [float(second) for second in range(math.ceil(duration))]
    return Sampled([min(int(second * rate), total - 1) for second in seconds], seconds, duration)

"""Which frames VideoChat-Flash sees: its "dynamic_fps1", in whole clips."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from sglang_mminfer.families.sampling import Sampled, check

CLIP = 4
"""Frames of a clip."""


def by_clips(total: int, rate: float, *, least: int, most: int, fps: float = 1.0) -> Sampled:
    """The middle frames of equal parts of the video: `fps` of them a second, rounded down to whole clips.

    Args:
        total, rate: frames of the file, and frames per second.
        least: no fewer frames than this, if the file has so many; a shorter file gives all its whole clips.
        most: no more frames than this. If the two contradict each other, `least` applies. Both are whole clips.

    Raises:
        ValueError: if the video has no frames.
    """
    rate = check(total, rate)
    wanted = min(CLIP * max(1, int(min(total / rate * fps, most) // CLIP)), most)
    wanted = max(wanted, least if least <= total else total // CLIP * CLIP)
    ends = np.linspace(0, total, min(wanted, total) + 1).astype(int)
    indices = [(start + stop - 1) // 2 for start, stop in pairwise(ends.tolist())]
    indices += indices[-1:] * (wanted - len(indices))  # a file with less than one frame a second repeats its last one
    return Sampled(indices, [i / rate for i in indices], total / rate)

"""How large media may be. Every bound stands here; it is checked before anything of that size is allocated."""

from __future__ import annotations

from sglang_mminfer import settings

RATIO = 200
"""The largest ratio of the longer side to the shorter one. Qwen's own code has the same limit."""

FRAMES = 1024
"""Frames that a request may ask for from one video. A larger number in the operator's own setting raises it."""

FRAMES_GIVEN = 4096
"""Frames that a video may have if it comes as single frames."""

DECODED_BYTES = 4 << 30
"""Bytes of decoded frames of one video that are held at a time."""

BATCH_BYTES = 256 << 20
"""Bytes of frames in their full size that are decoded at a time before they are made smaller."""


def check_size(kind: str, width: int, height: int) -> None:
    """Checks a picture or a frame of width x height pixels.

    Args:
        kind: "image" or "video", for the error.

    Raises:
        ValueError: if it is empty, has too many pixels, or one side is more than `RATIO` times the other.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{kind}: expected at least one pixel, got {width} x {height}")
    if width * height > settings.max_megapixels() * 1e6:
        raise ValueError(
            f"{kind}: {width} x {height} pixels are {width * height / 1e6:.1f} megapixels, and at most "
            f"{settings.max_megapixels():g} are taken"
        )
    if max(width, height) > RATIO * min(width, height):
        raise ValueError(
            f"{kind}: of {width} x {height} pixels one side is {max(width, height) / min(width, height):.0f} times the "
            f"other, and at most {RATIO} times are taken"
        )


def check_square(width: int, height: int) -> None:
    """Checks the square into which a model puts a picture of width x height pixels.

    Raises:
        ValueError: if the square has too many pixels.
    """
    side = max(width, height)
    if side * side > settings.max_megapixels() * 1e6:
        raise ValueError(
            f"image: {width} x {height} pixels, put into a square as this model has it, are {side * side / 1e6:.1f} "
            f"megapixels, and at most {settings.max_megapixels():g} are taken"
        )


def check_frames(count: int, width: int, height: int) -> None:
    """Checks how many frames of width x height pixels, in 8-bit RGB, are held at a time.

    Raises:
        ValueError: if they take more than `DECODED_BYTES`.
    """
    if count * width * height * 3 > DECODED_BYTES:
        raise ValueError(
            f"video: {count} frames of {width} x {height} pixels are {count * width * height * 3 / 2**30:.1f} GiB, and "
            f"at most {DECODED_BYTES >> 30} GiB are taken; ask for fewer frames (max_frames) or smaller ones "
            f"(max_long_side_pixel)"
        )


def batch_of(width: int, height: int, most: int) -> int:
    """How many frames of a size to decode at a time: as `BATCH_BYTES` allows, 1 to `most`."""
    return max(1, min(most, BATCH_BYTES // max(1, width * height * 3)))

"""How large media may be. Every bound stands here, and is held before anything of that size is allocated."""

from __future__ import annotations

from sglang_mminfer import settings

RATIO = 200
"""The longer side over the shorter one, as Qwen's own code has it: of a longer picture nothing is to be seen."""

FRAMES = 1024
"""That a request may ask of a video; more if the operator's own setting is more."""

FRAMES_GIVEN = 4096
"""Of a video that comes as single frames."""

DECODED_BYTES = 4 << 30
"""Of the frames of a video that are held at one time."""

BATCH_BYTES = 256 << 20
"""Of the frames that are decoded at one time where they are made smaller one by one."""


def check_size(kind: str, width: int, height: int) -> None:
    """Raises ValueError for a picture or a frame that is too large, too long or empty; `kind` says which it is."""
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
    """Raises ValueError for a picture that its model wants in a square, if that square is too large."""
    side = max(width, height)
    if side * side > settings.max_megapixels() * 1e6:
        raise ValueError(
            f"image: {width} x {height} pixels, put into a square as this model has it, are {side * side / 1e6:.1f} "
            f"megapixels, and at most {settings.max_megapixels():g} are taken"
        )


def check_frames(count: int, width: int, height: int) -> None:
    """Raises ValueError for more frames than may be held at one time."""
    if count * width * height * 3 > DECODED_BYTES:
        raise ValueError(
            f"video: {count} frames of {width} x {height} pixels are {count * width * height * 3 / 2**30:.1f} GiB, and "
            f"at most {DECODED_BYTES >> 30} GiB are taken; ask for fewer frames (max_frames) or smaller ones "
            f"(max_long_side_pixel)"
        )


def batch_of(width: int, height: int, most: int) -> int:
    """How many frames of a size to decode at one time, no more than `most`."""
    return max(1, min(most, BATCH_BYTES // max(1, width * height * 3)))

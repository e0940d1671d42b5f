"""How many tokens a frame or a picture becomes, and in what raster: what processor and model both must know."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import Any

from sglang_mminfer.families.llava_video.config import POOL_STRIDE


def pooled_side(config: Any) -> int:
    """Tokens along a side of a video frame after pooling."""
    side = patches(config)
    return math.ceil(side / POOL_STRIDE) if config.mm_spatial_pool_mode == "bilinear" else side // POOL_STRIDE


def patches(config: Any) -> int:
    """Patches along a side of a picture in the tower."""
    return int(config.vision_config.image_size) // int(config.vision_config.patch_size)


def newline(config: Any) -> str:
    """Where videos get newline tokens: "grid", "frame", "one_token" or "no_token"."""
    # Only a model of this kind of merging has learned a newline.
    return config.mm_newline_position if "unpad" in config.mm_patch_merge_type else "no_token"


def frame_shape(config: Any, last: bool) -> tuple[int, int, int]:
    """(rows, cols, tail) of a video frame, newline column included; `last` for the last frame of its video."""
    side, position = pooled_side(config), newline(config)
    if position == "grid":
        return side, side + 1, 0
    return side, side, int(position == "frame" or (position == "one_token" and last))


@dataclass(frozen=True)
class Tiles:
    """A picture of any resolution: fitted into a canvas of tiles. The padding is cut away after encoding.

    Attributes:
        across, down: tiles of the canvas.
        top, left: patches of the canvas before the picture.
        height, width: patches that belong to the picture.
        rows, cols: the tokens that these patches become, without newlines; fewer than patches if there are too many.
    """

    across: int
    down: int
    top: int
    left: int
    height: int
    width: int
    rows: int
    cols: int


def tiles_of(config: Any, width: int, height: int) -> Tiles:
    """The tiles of a picture of `width` x `height` pixels."""
    size, side = int(config.vision_config.image_size), patches(config)
    canvas_width, canvas_height = best_canvas(width, height, canvases(config.image_grid_pinpoints, size))
    across, down = canvas_width // size, canvas_height // size
    whole_rows, whole_cols = down * side, across * side
    top = left = 0
    if "unpad" in config.mm_patch_merge_type:
        # Where the picture is wider than the canvas, the padding is above and below; else left and right.
        if width / height > whole_cols / whole_rows:
            top = min((whole_rows - int(height * (whole_cols / width))) // 2, (whole_rows - 1) // 2)
        else:
            left = min((whole_cols - int(width * (whole_rows / height))) // 2, (whole_cols - 1) // 2)
    rows, cols = whole_rows - 2 * top, whole_cols - 2 * left
    kept_rows, kept_cols = rows, cols
    if most := re.fullmatch(r"anyres_max_(\d+)", config.image_aspect_ratio):
        excess = math.sqrt(rows * cols / (int(most[1]) * side**2))
        if excess > 1.1 and "unpad" in config.mm_patch_merge_type:
            kept_rows, kept_cols = max(1, int(rows // excess)), max(1, int(cols // excess))
    return Tiles(across, down, top, left, rows, cols, kept_rows, kept_cols)


def canvases(pinpoints: Any, size: int) -> list[tuple[int, int]]:
    """(width, height) of every canvas that the config allows: a list, its text, or "(1x1),...,(6x6)" in tiles.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        ends = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if ends:
            (low_w, low_h), (high_w, high_h) = ends[0], ends[-1]
            return [(i * size, j * size) for i in range(low_w, high_w + 1) for j in range(low_h, high_h + 1)]
    try:
        listed = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        sizes = [(int(w), int(h)) for w, h in listed]
    except (TypeError, ValueError, SyntaxError):
        sizes = []
    if not sizes or any(w < size or h < size or w % size or h % size for w, h in sizes):
        raise ValueError(f"image_grid_pinpoints: expected pairs of multiples of {size}, got {pinpoints!r}")
    return sizes


def best_canvas(width: int, height: int, allowed: list[tuple[int, int]]) -> tuple[int, int]:
    """The canvas in which most of a picture's pixels survive; among equals the smallest."""

    def worth(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(allowed, key=worth)


def fitted(width: int, height: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture that is scaled to fill a canvas in one direction."""
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        return canvas[0], min(math.ceil(height * across), canvas[1])
    return min(math.ceil(width * down), canvas[0]), canvas[1]

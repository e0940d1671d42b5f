"""Pictures of any size: a view of the whole, and a grid of tiles behind it ("anyres_nopad").

The picture is stretched to the canvas of whole tiles that keeps most of its pixels, and each tile becomes 64 tokens
like the whole does. The original puts tiles together as if the tokens of each stood in 8 x 8, line by line through all
tiles of a row. They do not, but the weights were trained with it.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import torch

from sglang_mminfer.families.videochat_flash.config import CLIP_TOKENS

ACROSS = "tiles_across"
"""Key in an item's `model_specific_data`: how many tiles a row has."""

_LINE = 8  # tokens of a tile that stay together: the root of 64


def canvases(pinpoints: Any, size: int) -> list[tuple[int, int]]:
    """(tiles across, tiles down) of every canvas that a config allows.

    Args:
        pinpoints: pairs of pixels, or "(1x1),...,(6x6)" in tiles; None: one tile.
        size: pixels along a side of a tile.

    Raises:
        ValueError: if it says neither.
    """
    if pinpoints is None:
        return [(1, 1)]
    if isinstance(pinpoints, str) and "x" in pinpoints:
        ends = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if ends:
            (left, top), (right, bottom) = ends[0], ends[-1]
            return [(a, b) for a in range(left, right + 1) for b in range(top, bottom + 1)]
    try:
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        sizes = [(int(w) // size, int(h) // size) for w, h in pairs if not (int(w) % size or int(h) % size)]
    except (ValueError, TypeError, SyntaxError):
        sizes = []
    if not sizes or min(min(canvas) for canvas in sizes) < 1:
        raise ValueError(
            f"image_grid_pinpoints: expected pairs of multiples of {size} pixels or a range like (1x1),...,(6x6), "
            f"got {pinpoints!r}"
        )
    return sizes


def best_canvas(width: int, height: int, allowed: list[tuple[int, int]], size: int) -> tuple[int, int]:
    """The canvas in which most of a picture's pixels survive; among equals the smallest, then the first."""

    def worth(canvas: tuple[int, int]) -> tuple[int, int]:
        across, down = canvas[0] * size, canvas[1] * size
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -across * down

    return max(allowed, key=worth)


def join(tiles: torch.Tensor, across: int) -> torch.Tensor:
    """The tokens of a picture from those of its tiles, row by row: [tiles, 64, hidden] -> [64 * tiles, hidden]."""
    if len(tiles) == 1:
        return tiles[0]
    lines = tiles.unflatten(0, (-1, across)).unflatten(2, (_LINE, CLIP_TOKENS // _LINE))
    return lines.transpose(1, 2).flatten(0, 3)

"""Frames with cards in them, and the same frames as the patches that the vision tower gets.

The haystack is `media.Scene`: smooth shapes that drift over a background. Training and evaluation draw with the same
functions. Evaluation then writes files; training writes none and imitates the losses of a video codec.
"""

from __future__ import annotations

import numpy as np

from sglang_mminfer.tools.media import Scene
from sglang_mminfer.tools.needles.glyphs import CELL

TILE = 112
"""The side of a frame, and of a window of the vision tower's attention, in pixels: 4 x 4 cells, 16 tokens."""
TILE_CELLS = (TILE // CELL) ** 2
PATCH = 14
# The mean and standard deviation of Qwen2-VL's processor (those of OpenAI's CLIP).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def haystack(frames: int, side: int, seed: int, step: float = 0.5) -> np.ndarray:
    """uint8 [frames, side, side, 3]: moving shapes, `step` seconds between frames."""
    scene = Scene(side, side, seed)
    return np.stack([scene.frame(i * step) for i in range(frames)])


def put_card(frames: np.ndarray, cell: int, card: np.ndarray) -> None:
    """Put a card over one cell (counted row by row) of all `frames` [n, side, side, 3], in place."""
    row, column = divmod(cell, frames.shape[2] // CELL)
    frames[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = card


def patches(frames: np.ndarray) -> np.ndarray:
    """uint8 [2 * n, side, side, 3] -> uint8 [windows, 64, 1176]: patches with the processor's layout.

    Each pair of frames is cut into windows of 112 x 112, over which the tower attends separately. Inside a window the
    four patches of a cell follow each other. If a frame is one window, the order of patches is the processor's, too.
    """
    pairs, windows = frames.shape[0] // 2, frames.shape[2] // TILE
    cells = TILE // CELL
    split = frames.reshape(pairs, 2, windows, cells, 2, PATCH, windows, cells, 2, PATCH, 3)
    # pair, window row, window column, cell row, cell column, patch row, patch column, colour, frame, y, x
    return split.transpose(0, 2, 6, 3, 7, 4, 8, 10, 1, 5, 9).reshape(-1, 64, 3 * 2 * PATCH * PATCH)


def card_patches(cards: np.ndarray) -> np.ndarray:
    """uint8 or float [n, 2, 28, 28, 3], cards in both frames of a pair -> [n, 4, 1176], their patches."""
    split = cards.reshape(-1, 2, 2, PATCH, 2, PATCH, 3)
    return split.transpose(0, 2, 4, 6, 1, 3, 5).reshape(-1, 4, 3 * 2 * PATCH * PATCH)


def blurred(pictures: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Imitate a codec: pictures [..., y, x, 3] -> float32 of that shape, with some blur, grain and loss of colour."""
    out = pictures.astype(np.float32)
    if random.random() < 0.5:
        share = np.float32(random.uniform(0, 0.25))
        for axis in (-3, -2):
            edge = np.concatenate([out.take([0], axis), out, out.take([-1], axis)], axis)
            size = out.shape[axis]
            before, after = edge.take(range(size), axis), edge.take(range(2, size + 2), axis)
            out = (1 - 2 * share) * out + share * (before + after)
    if random.random() < 0.3:  # colour is stored at half resolution
        grey = out.mean(-1, keepdims=True)
        out = grey + (out - grey) * np.float32(random.uniform(0.3, 1))
    out += random.normal(0, random.uniform(0, 8), out.shape).astype(np.float32)
    return np.clip(out, 0, 255)

"""The signs on a needle's card: the letters A to P and the digits, as small drawings in many variants.

A card fills one cell of 28 x 28 pixels, which is one token of the language model. At the left it shows a bright letter
on a dark plate, the needle's key; at the right, a second sign. The second sign of a plain needle is its digit, bright
on dark. The second sign of a relay is the key of another needle, dark on bright: "the same digit as that needle".
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

KEYS = "ABCDEFGHIJKLMNOP"
DIGITS = "0123456789"
SYMBOLS = KEYS + DIGITS

CELL = 28
"""Pixels of a card's side: 2 x 2 patches of 14, merged to one token."""

VARIANTS = 512
"""How many drawings of each sign a bank has. A model learned a dozen drawings by heart, but not 256."""

# Seven rows of five columns, from the top and from the left. The zero is crossed, unlike O.
_DRAWINGS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10011 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "11111 00100 00100 00100 00100 00100 11111",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 10100 00100 00100 00100 11111",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 00100 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
_SHARP = 8  # samples for each dot of a drawing


@lru_cache
def glyph_bank(seed: int, variants: int = VARIANTS) -> np.ndarray:
    """float32 [26, variants, 28, 14]: which share of each pixel a sign covers, the signs in the order of SYMBOLS.

    Variants differ in width, height, place, slant, weight of the stroke and sharpness.
    """
    random = np.random.default_rng((seed, 0x61F))
    bank = np.empty((len(SYMBOLS), variants, CELL, CELL // 2), np.float32)
    ys, xs = np.mgrid[0:CELL, 0 : CELL // 2].astype(np.float32)
    for i, symbol in enumerate(SYMBOLS):
        dots = np.array([[float(dot) for dot in row] for row in _DRAWINGS[symbol].split()], np.float32)
        sheet = np.kron(np.pad(dots, 2), np.ones((_SHARP, _SHARP), np.float32))
        smooth = sheet
        for axis in (0, 1):  # a soft edge, so that a threshold sets the weight of the stroke
            smooth = np.mean([np.roll(smooth, shift, axis) for shift in range(-3, 4)], axis=0)
        for j in range(variants):
            width, height = random.uniform(8.5, 11.5), random.uniform(17, 23)
            left = (CELL // 2 - width) / 2 + random.uniform(-1, 1)
            top = (CELL - height) / 2 + random.uniform(-2, 2)
            slant = random.uniform(-0.08, 0.08)
            x = (xs + 0.5 - left + slant * (ys - CELL / 2)) / width * 5 + 2
            y = (ys + 0.5 - top) / height * 7 + 2
            value = _sample(smooth, y * _SHARP - 0.5, x * _SHARP - 0.5)
            weight, edge = random.uniform(0.35, 0.55), random.uniform(0.12, 0.35)
            bank[i, j] = np.clip((value - weight) / edge + 0.5, 0, 1)
    return bank


def _sample(sheet: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear samples of a sheet; coordinates outside are clipped to its edge."""
    rows, columns = sheet.shape
    y, x = np.clip(y, 0, rows - 1.001), np.clip(x, 0, columns - 1.001)
    top, left = y.astype(int), x.astype(int)
    v, u = y - top, x - left
    upper = sheet[top, left] * (1 - u) + sheet[top, left + 1] * u
    lower = sheet[top + 1, left] * (1 - u) + sheet[top + 1, left + 1] * u
    return upper * (1 - v) + lower * v


def draw_card(left: str, right: str, random: np.random.Generator, bank_seed: int = 0) -> np.ndarray:
    """uint8 [28, 28, 3]: a card with two signs. A letter at the right, which marks a relay, is dark on bright."""
    bank = glyph_bank(bank_seed)
    picture = np.empty((CELL, CELL, 3), np.float32)
    for half, symbol in enumerate((left, right)):
        cover = bank[SYMBOLS.index(symbol), random.integers(bank.shape[1])][..., None]
        dark, bright = random.uniform(0, 60, 3).astype(np.float32), random.uniform(185, 255, 3).astype(np.float32)
        plate, ink = (bright, dark) if half and symbol in KEYS else (dark, bright)
        picture[:, half * (CELL // 2) : (half + 1) * (CELL // 2)] = plate + cover * (ink - plate)
    return picture.astype(np.uint8)

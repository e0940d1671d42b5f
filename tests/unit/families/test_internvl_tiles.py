"""InternVL's tiles in the oracle: those of the server, and what the code it was released with makes instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from families.internvl_tiles import RELEASED, SERVED, normalised

SIDE = 448

# Width and height; columns and rows of the server and of the released code, at most twelve tiles.
SHAPES = [
    ((640, 480), (4, 3), (4, 3)),
    ((1920, 1080), (4, 2), (4, 2)),
    ((1024, 1024), (3, 3), (3, 3)),
    ((896, 448), (4, 2), (2, 1)),
    ((448, 448), (3, 3), (1, 1)),
    ((64, 64), (3, 3), (1, 1)),
    ((448, 896), (2, 4), (1, 2)),
]


@pytest.mark.parametrize(("size", "served", "released"), SHAPES)
def test_shapes(size: tuple[int, int], served: tuple[int, int], released: tuple[int, int]) -> None:
    assert SERVED.shape(*size, SIDE, 12) == served
    assert RELEASED.shape(*size, SIDE, 12) == released


@pytest.mark.parametrize("seed", range(8))
def test_the_servers_tiles(seed: int) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.multimodal.processors.internvl import InternVLProcessor

    random = np.random.default_rng(seed)
    width, height = (int(n) for n in random.integers(8, 700, 2))
    width = {0: width, 1: height, 2: 2 * height, 3: 3 * height}[seed % 4]
    picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    theirs = InternVLProcessor.dynamic_preprocess(normalised(picture), SIDE, 12, use_thumbnail=True)
    assert torch.equal(SERVED.tiles(picture, SIDE), theirs.float())


def test_the_released_tiles_are_cut_from_pils_picture() -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (300, 600, 3), dtype=np.uint8))
    tiles = RELEASED.tiles(picture, SIDE)
    whole = picture.resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC)
    expected = [whole.crop((0, 0, SIDE, SIDE)), whole.crop((SIDE, 0, 2 * SIDE, SIDE)), picture.resize((SIDE, SIDE))]
    assert torch.equal(tiles, torch.stack([normalised(one) for one in expected]).bfloat16().float())


def test_frames() -> None:
    assert SERVED.frames(120, 8) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert RELEASED.frames(120, 8) == [7, 22, 37, 52, 67, 81, 96, 111]
    assert SERVED.frames(9, 1) == [0] and SERVED.frames(1, 3) == [0, 0, 0]

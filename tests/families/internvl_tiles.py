"""How InternVL cuts a picture into tiles: by the code it was released with, and by SGLang's.

They are not the same. Among shapes whose proportions are equally near, the released code takes the one with more
tiles only if the picture fills half of them; SGLang always does, so that a small square picture becomes nine tiles and
a thumbnail. The released code resizes bytes with PIL, SGLang normalised floats without antialiasing. The released code
takes frames from the middle of equal parts of a video, SGLang from the first to the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

MOST_TILES = 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Rule:
    """One of `RELEASED` and `SERVED`."""

    released: bool

    def tiles(self, picture: Image.Image, side: int, most: int = MOST_TILES) -> torch.Tensor:
        """fp32 [tiles, 3, side, side]: the picture row by row, and the whole of it in one tile if there are several.

        Args:
            most: tiles without the last one.
        """
        columns, rows = self.shape(picture.width, picture.height, side, most)
        whole = self._resized(picture, columns * side, rows * side)
        cut = [
            whole[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        if len(cut) > 1:
            cut.append(self._resized(picture, side, side))
        return torch.stack(cut).bfloat16().float()  # as the model is given them

    def shape(self, width: int, height: int, side: int, most: int) -> tuple[int, int]:
        """Columns and rows of 1 to `most` tiles."""
        shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
        nearest = min(abs(width / height - c / r) for c, r in shapes)
        equal = sorted(((c, r) for c, r in shapes if abs(width / height - c / r) == nearest), key=math.prod)
        if not self.released:
            return max(equal, key=math.prod)
        return (equal[:1] + [shape for shape in equal[1:] if width * height > side * side * math.prod(shape) / 2])[-1]

    def frames(self, total: int, count: int) -> list[int]:
        """Which of `total` frames, `count` of them."""
        if self.released:
            part = (total - 1) / count
            return [int(part / 2 + np.round(part * i)) for i in range(count)]
        return [0] if count == 1 else [int(i) for i in np.linspace(0, total - 1, count)]

    def _resized(self, picture: Image.Image, width: int, height: int) -> torch.Tensor:
        """Normalised, [3, height, width]."""
        if self.released:
            return normalised(picture.resize((width, height)))  # bicubic
        return torch.nn.functional.interpolate(
            normalised(picture)[None], size=(height, width), mode="bicubic", align_corners=False
        )[0]


RELEASED, SERVED = Rule(released=True), Rule(released=False)


def normalised(picture: Image.Image) -> torch.Tensor:
    """[3, height, width] of an RGB picture."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

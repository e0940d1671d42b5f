"""Pictures of moving shapes, the same for the same seed: what synthetic videos show."""

from __future__ import annotations

import numpy as np


class Scene:
    """A background with a few discs and boxes that drift and bounce. A pure function of seed and time."""

    SHAPES = 5

    def __init__(self, width: int, height: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.width, self.height = width, height
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float32)
        n = self.SHAPES
        self.size = random.uniform(0.08, 0.2, n) * min(width, height)
        self.start = random.uniform(0, 1, (n, 2)) * (width, height)
        # In pixels per second; a shape crosses the picture in a few seconds.
        self.speed = random.uniform(0.15, 0.5, (n, 2)) * (width, height) * random.choice([-1, 1], (n, 2))
        self.colour = random.uniform(40, 255, (n, 3)).astype(np.float32)
        self.disc = random.random(n) < 0.5
        corners = random.uniform(20, 200, (2, 2, 3))
        u, v = (self.x / max(width - 1, 1))[..., None], (self.y / max(height - 1, 1))[..., None]
        top = corners[0, 0] * (1 - u) + corners[0, 1] * u
        bottom = corners[1, 0] * (1 - u) + corners[1, 1] * u
        self.background = (top * (1 - v) + bottom * v).astype(np.float32)

    def frame(self, seconds: float) -> np.ndarray:
        """The picture at a time: uint8 [height, width, 3]."""
        picture = self.background * np.float32(1 + 0.05 * np.sin(0.7 * seconds))
        extent = np.array([self.width, self.height], dtype=np.float64)
        for i in range(self.SHAPES):
            # A shape that bounces between two walls moves as a triangle wave.
            x, y = extent - np.abs((self.start[i] + self.speed[i] * seconds) % (2 * extent) - extent)
            half_side = self.size[i] + 1
            box = np.s_[
                max(0, int(y - half_side)) : int(y + half_side) + 2, max(0, int(x - half_side)) : int(x + half_side) + 2
            ]
            dx, dy = np.abs(self.x[box] - np.float32(x)), np.abs(self.y[box] - np.float32(y))
            distance = np.hypot(dx, dy) if self.disc[i] else np.maximum(dx, dy)
            # The rim is a slope of one pixel, so that a shape that moves by a fraction of a pixel does not flicker.
            cover = np.clip(np.float32(self.size[i] + 0.5) - distance, 0, 1)[..., None]
            picture[box] += cover * (self.colour[i] - picture[box])
        return np.clip(picture, 0, 255, out=picture).astype(np.uint8)

"""From pixels to the 64 tokens of a clip or an image: tower, merging, projector."""

from __future__ import annotations

import torch
from torch import nn

from sglang_mminfer.families.videochat_flash.config import CLIP_TOKENS, TowerConfig
from sglang_mminfer.families.videochat_flash.merging import merge_tokens
from sglang_mminfer.families.videochat_flash.towers import build_tower

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixel values from 0 to 1, by channel."""


class Projector(nn.Module):
    """Linear, GELU, Linear; its keys are `mlp.0` and `mlp.2`."""

    def __init__(self, tower_hidden: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(tower_hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class VisionPath(nn.Module):
    """From normalised pixels [clips, 4 or 1 frames, 3, size, size] to [clips, 64, hidden of the language model]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: TowerConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.tower = build_tower(config)
        self.projector = Projector(config.hidden, hidden)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `forward`, for uint8 pixels on any device."""
        weight = next(self.projector.parameters())
        scaled = pixels.to(weight.device).float() / 255
        return self(((scaled - self.mean) / self.std).to(weight.dtype))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projector(merge_tokens(self.tower(pixels), CLIP_TOKENS, self.config.heads))

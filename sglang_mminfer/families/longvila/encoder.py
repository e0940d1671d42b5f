"""From pixels to the tokens of the language model: SigLIP and a projector that merges patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sglang_mminfer.families.longvila.config import PROJECTORS, check
from sglang_mminfer.families.own.siglip import SiglipTower


class LongVilaEncoder(nn.Module):
    """All of the model before its language model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        check(config)
        self.vision_tower = SiglipTower(config.vision_config, config.mm_vision_select_layer)
        self.mm_projector = Projector(
            config.mm_projector_type, config.vision_config.hidden_size, config.text_config.hidden_size
        )

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, tokens, hidden] of uint8 pixels [n, 3, size, size]."""
        return self.mm_projector(self.vision_tower(pixels))

    def own_name(self, name: str) -> str | None:
        """The parameter of this module that a tensor of the checkpoint goes to; "" if the tensor is not used, None if
        it belongs to no part of this module.

        Args:
            name: the tensor's folder, a dot and its name.
        """
        if name.startswith("vision_tower."):
            name = name.removeprefix("vision_tower.").removeprefix("vision_model.")
            return f"vision_tower.{name}" if self.vision_tower.wants(name) else ""
        return name if name.startswith("mm_projector.") else None


class Projector(nn.Module):
    """[n, side * side, inside] to [n, tokens, outside]; the layers are numbered as the checkpoints number them."""

    def __init__(self, kind: str, inside: int, outside: int) -> None:
        super().__init__()
        merge = PROJECTORS[kind]
        merged = merge**2 * inside
        self.layers: nn.Module
        if kind == "linear":
            self.layers = nn.Linear(inside, outside)
        elif kind == "mlp2x_gelu":
            self.layers = nn.Sequential(nn.Linear(inside, outside), nn.GELU(), nn.Linear(outside, outside))
        else:
            narrowed = [nn.LayerNorm(merged), nn.Linear(merged, outside)]
            if merge == 3:
                narrow = 3 * inside
                narrowed = [
                    *(nn.LayerNorm(merged), nn.Linear(merged, narrow), nn.GELU()),
                    *(nn.LayerNorm(narrow), nn.Linear(narrow, outside)),
                ]
            self.layers = nn.Sequential(Merge(merge), *narrowed, nn.GELU(), nn.Linear(outside, outside))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.layers(patches)


class Merge(nn.Module):
    """Puts the patches of each `by` x `by` square behind each other, row by row, in one token."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, side * side, c] to [n, ceil(side / by)^2, by * by * c]; zeros where the side does not divide."""
        by, side = self.by, round(patches.shape[1] ** 0.5)
        raster = patches.unflatten(1, (side, side))
        short = -side % by
        raster = functional.pad(raster, (0, 0, 0, short, 0, short))
        half = (side + short) // by
        return raster.unflatten(1, (half, by)).unflatten(3, (half, by)).transpose(2, 3).flatten(3, 5).flatten(1, 2)

"""From pixels to the tokens of the language model: SigLIP, an MLP, pooling and newline tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sglang_mminfer.families.llava_video import layout
from sglang_mminfer.families.llava_video.config import POOL_STRIDE, check
from sglang_mminfer.families.own.siglip import SiglipTower
from sglang_mminfer.modality.items import KEY, Place

TOWER = "model.vision_tower.vision_tower.vision_model."


class LlavaVideoEncoder(nn.Module):
    """All of the model before its language model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        check(config)
        self.config = config
        hidden = config.text_config.hidden_size
        self.vision_tower = SiglipTower(config.vision_config, config.mm_vision_select_layer)
        self.mm_projector = projector(config.mm_projector_type, config.vision_config.hidden_size, hidden)
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.empty(hidden), requires_grad=False)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, patches, hidden]: pictures after the projector."""
        return self.mm_projector(self.vision_tower(pixels))

    def encode(self, is_video: bool, data: Mapping[str, Any], features: torch.Tensor) -> torch.Tensor:
        """The embedding of one item: [tokens, hidden].

        Args:
            data: the item's `model_specific_data`; see `prompt.Placed.data`.
            features: what `see` returns for the item's pictures: [pictures, patches, hidden].
        """
        raster = features.unflatten(1, (self.vision_tower.side, self.vision_tower.side))  # [n, rows, cols, hidden]
        if is_video:
            frame = pooled(raster, self.config.mm_spatial_pool_mode)
            if layout.newline(self.config) == "grid":
                frame = self._with_newlines(frame)
            return self._with_tail(frame[0].flatten(0, 1), Place(*data[KEY][0]).tail)
        if "width" in data:
            return self._of_tiles(raster, layout.tiles_of(self.config, data["width"], data["height"]))
        return self._with_tail(raster[0].flatten(0, 1), Place(*data[KEY][0]).tail)

    def _of_tiles(self, raster: torch.Tensor, tiles: layout.Tiles) -> torch.Tensor:
        """The tokens of a picture, put together from its tiles without the padding, a newline behind each row."""
        picture = raster.unflatten(0, (tiles.down, tiles.across)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        picture = picture[tiles.top : tiles.top + tiles.height, tiles.left : tiles.left + tiles.width]
        if (tiles.rows, tiles.cols) != (tiles.height, tiles.width):
            picture = _interpolated(picture[None], tiles.rows, tiles.cols)[0]
        if "unpad" in self.config.mm_patch_merge_type:
            picture = self._with_newlines(picture[None])[0]
        return picture.flatten(0, 1)

    def _with_newlines(self, raster: torch.Tensor) -> torch.Tensor:
        """The raster with a column of newlines: [n, rows, cols + 1, hidden]."""
        column = self.image_newline.expand(*raster.shape[:2], 1, -1)
        return torch.cat((raster, column.to(raster.dtype)), dim=2)

    def _with_tail(self, tokens: torch.Tensor, tail: int) -> torch.Tensor:
        return torch.cat((tokens, self.image_newline.to(tokens.dtype).expand(tail, -1))) if tail else tokens

    def own_name(self, name: str) -> str | None:
        """The parameter of this module that a tensor of the checkpoint goes to; "" if the tensor is not used, None if
        it belongs to no part of this module."""
        if name.startswith(TOWER):
            name = name.removeprefix(TOWER)
            return f"vision_tower.{name}" if self.vision_tower.wants(name) else ""
        if name == "model.image_newline" and not hasattr(self, "image_newline"):
            return ""
        if name.startswith("model.mm_projector.") or name == "model.image_newline":
            return name.removeprefix("model.")
        return None


def projector(kind: str, inside: int, outside: int) -> nn.Module:
    """ "linear", or "mlpNx_gelu": N linear layers with GELU between, numbered as the checkpoints number them."""
    if kind == "linear":
        return nn.Linear(inside, outside)
    layers: list[nn.Module] = [nn.Linear(inside, outside)]
    for _ in range(1, int(kind.removeprefix("mlp").removesuffix("x_gelu"))):
        layers += [nn.GELU(), nn.Linear(outside, outside)]
    return nn.Sequential(*layers)


def pooled(raster: torch.Tensor, mode: str) -> torch.Tensor:
    """Frames [n, side, side, hidden], each side halved: rounded up by "bilinear", down by "average" and "max"."""
    if mode == "bilinear":
        rows, cols = (-(-side // POOL_STRIDE) for side in raster.shape[1:3])
        return _interpolated(raster, rows, cols)
    pool = functional.avg_pool2d if mode == "average" else functional.max_pool2d
    return pool(raster.permute(0, 3, 1, 2), POOL_STRIDE).permute(0, 2, 3, 1)


def _interpolated(raster: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The raster resized to [n, rows, cols, hidden]."""
    return functional.interpolate(raster.permute(0, 3, 1, 2), (rows, cols), mode="bilinear").permute(0, 2, 3, 1)

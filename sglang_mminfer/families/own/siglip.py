"""SigLIP as these models use it: the states before the last layers, without the closing norm and the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from sglang_mminfer.families.frames import MEAN

STD = MEAN
"""The standard deviation of pixel values from 0 to 1, in every published SigLIP."""


class SiglipTower(nn.Module):
    """The patches of pictures behind one layer of the vision tower.

    Args:
        config: the config of the whole tower.
        select_layer: the hidden state to return, counted from the end if negative: -2 leaves out the last layer.

    Raises:
        ValueError: if the tower has no such layer.
    """

    def __init__(self, config: SiglipVisionConfig, select_layer: int) -> None:
        super().__init__()
        layers = config.num_hidden_layers + 1 + select_layer if select_layer < 0 else select_layer
        if not 0 < layers <= config.num_hidden_layers:
            raise ValueError(
                f"mm_vision_select_layer: expected a layer of a tower of {config.num_hidden_layers}, got {select_layer}"
            )
        shortened = SiglipVisionConfig(**{**config.to_dict(), "num_hidden_layers": layers, "vision_use_head": False})
        shortened._attn_implementation = "sdpa"
        model = SiglipVisionModel(shortened)
        # Transformers before 5.10 kept the parts one level lower.
        model = getattr(model, "vision_model", model)
        self.embeddings, self.encoder = model.embeddings, model.encoder
        self.layers = layers
        self.side = config.image_size // config.patch_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """From uint8 pixels [n, 3, size, size] to [n, side * side, hidden]."""
        weight = self.embeddings.patch_embedding.weight
        values = (pixels.to(weight.device, torch.float32) / 255 - MEAN) / STD
        return self.encoder(inputs_embeds=self.embeddings(values.to(weight.dtype))).last_hidden_state

    def wants(self, name: str) -> bool:
        """Whether a tensor of the checkpoint, by its name within the tower, belongs to a part that is used."""
        if name.startswith(("post_layernorm.", "head.")) or name == "embeddings.position_ids":
            return False
        if name.startswith("encoder.layers."):
            return int(name.split(".")[2]) < self.layers
        return True


def vision_config(values: dict[str, Any]) -> SiglipVisionConfig:
    """Transformers' config of the tower from a dictionary that may name its architecture and model type, too."""
    return SiglipVisionConfig(**{k: v for k, v in values.items() if k not in ("architectures", "model_type")})

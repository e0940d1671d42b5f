"""The forward pass of Qwen2.5-VL as training and masked evaluation need it: batched, and layer by layer.

The modules are those of transformers; only the loops around them are new. The vision tower of transformers calls
attention once for each window, and its language model takes no mask of this kind and does not return the hidden states
between layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def encode_windows(model: Any, pixels: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """pixels [windows, 64, 1176] -> tokens [windows * 16, hidden]. Every block of the tower must use windows.

    Args:
        corners: int64 [windows, 2], row and column of each window's first patch in its picture.
    """
    tower = model.model.visual
    count = pixels.shape[0]
    weight = tower.patch_embed.proj.weight
    hidden = functional.linear(pixels, weight.reshape(weight.shape[0], -1))
    # The four patches of a cell follow each other, and a window has 4 x 4 cells.
    cell, patch = torch.arange(64) // 4, torch.arange(64) % 4
    patch_in_window = torch.stack([cell // 4 * 2 + patch // 2, cell % 4 * 2 + patch % 2], 1)
    angles = (corners[:, None] + patch_in_window)[..., None].float() * tower.rotary_pos_emb.inv_freq
    angles = angles.flatten(-2)  # rows, then columns
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos(), angles.sin()
    for block in tower.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(hidden)).view(count, 64, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(count, 64, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def run_layers(
    model: Any, embeddings: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Hidden states [batch, tokens, hidden] before the first layer and after each layer; the last is not normalised.

    Args:
        positions: int64 [3, batch, tokens].
        mask: broadcasts to [batch, heads, tokens, tokens]; bool, True where a row sees a key, or additive. None means
            causal.
    """
    language = model.model.language_model
    rotation = language.rotary_emb(embeddings, positions)
    states = [embeddings]
    for layer in language.layers:
        states.append(layer(states[-1], attention_mask=mask, position_embeddings=rotation))
    return states


def answer_logits(model: Any, state: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens `choices` for rows of the last hidden state."""
    return functional.linear(model.model.language_model.norm(state), model.lm_head.weight[choices])

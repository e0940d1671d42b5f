"""The forward pass of Qwen2.5-VL in the shape that training and masked evaluation want: batched, layer by layer.

The modules are transformers' own; only the loops around them are written anew. transformers' vision tower calls
attention once for each window and its language model takes no list of masks and gives back no hidden states halfway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def encode_windows(model: Any, pixels: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Tokens [windows * 16, hidden] of pixels [windows, 64, 1176]. Every block of the tower must be a windowed one."""
    tower = model.model.visual
    count = pixels.shape[0]
    weight = tower.patch_embed.proj.weight
    hidden = functional.linear(pixels, weight.reshape(weight.shape[0], -1))
    # Four patches of a cell follow each other, 4 x 4 cells in a window.
    cell, patch = torch.arange(64) // 4, torch.arange(64) % 4
    inside = torch.stack([cell // 4 * 2 + patch // 2, cell % 4 * 2 + patch % 2], 1)
    angles = (corners[:, None] + inside)[..., None].float() * tower.rotary_pos_emb.inv_freq
    angles = angles.flatten(-2)  # rows, then columns
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos(), angles.sin()
    for block in tower.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(hidden)).view(count, 64, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(_turn(q, cos, sin), _turn(k, cos, sin), v)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(count, 64, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def run_layers(
    model: Any, embeddings: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Hidden states before the first layer and after each, all [batch, tokens, hidden]; the last one not normalized.

    Args:
        positions: int64 [3, batch, tokens].
        mask: bool, True where a row may look, or what is added to its logits; broadcast to
            [batch, heads, tokens, tokens]. None: causal.
    """
    language = model.model.language_model
    rotation = language.rotary_emb(embeddings, positions)
    states = [embeddings]
    for layer in language.layers:
        states.append(layer(states[-1], attention_mask=mask, position_embeddings=rotation))
    return states


def answer_logits(model: Any, state: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """Logits of some tokens (`choices`) for rows of the last state."""
    return functional.linear(model.model.language_model.norm(state), model.lm_head.weight[choices])

"""The two video towers of VideoChat-Flash in plain torch: UMT-L (arXiv 2303.16058), InternVideo2-1B (arXiv 2403.15377).

A clip is 4 frames whose patches all see each other; an image is a clip of one frame with positions of its own.
Modules have the names of the keys in released checkpoints. The original's quirks are kept, because its weights were
trained with them: the last layer is left out, UMT's keys have no bias, InternVideo2 norms queries and
keys over all heads at once and scales each residual in fp32.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sglang_mminfer.families.videochat_flash.config import TowerConfig

_PRETRAINED_SIDE = 14  # patches along a side for which UMT's positions were made: 224 / 16


def build_tower(config: TowerConfig) -> nn.Module:
    """The tower of a checkpoint, its weights not yet loaded.

    It takes normalised pixels [clips, frames, 3, size, size], where `frames` is 1 or `config.frames`, and returns
    [clips, frames * patches, hidden].
    """
    return UMT(config) if config.kind == "umt" else InternVideo2(config)


class UMT(nn.Module):
    """UMT-L: sinusoid positions, LayerNorm, and a norm at the end."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.encoder = _UMTEncoder(config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixels)


class _UMTEncoder(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(_UMTBlock(config) for _ in range(config.layers_used))
        self.vision_layernorm = nn.LayerNorm(config.hidden, eps=1e-12)
        for name, frames in (("positions", config.frames), ("image_positions", 1)):
            # Checkpoints hold neither table: the original computes both in fp32, too.
            table = sinusoid_positions(frames, config.side, config.hidden).to(torch.get_default_device())
            self.register_buffer(name, table, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        positions = self.image_positions if pixels.shape[1] == 1 else self.positions
        x = self.patch_embed(pixels)
        x = x + positions.to(x)
        for block in self.blocks:
            x = block(x)
        return self.vision_layernorm(x)


class InternVideo2(nn.Module):
    """InternVideo2-1B: learned positions, a class token, RMSNorm, LayerScale, and no norm at the end."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.frames * config.patches, config.hidden))
        self.img_pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, config.hidden))
        self.blocks = nn.ModuleList(_InternVideo2Block(config) for _ in range(config.layers_used))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + (self.img_pos_embed if pixels.shape[1] == 1 else self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class PatchEmbed(nn.Module):
    """[clips, frames, 3, size, size] -> [clips, frames * patches, hidden], frame by frame in raster order."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        # A convolution without overlap is a matrix product, which is what `forward` does with its weights.
        self.proj = nn.Conv3d(3, config.hidden, (1, config.patch, config.patch), (1, config.patch, config.patch))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        clips, frames, colours, height, width = pixels.shape
        rows, cols = height // self.patch, width // self.patch
        patches = pixels.reshape(clips, frames, colours, rows, self.patch, cols, self.patch)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(clips, frames * rows * cols, -1)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class _UMTBlock(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.attn = _UMTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.mlp = _MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _UMTAttention(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden))
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        return self.proj(_attend(q, k, v, self.heads))


class _InternVideo2Block(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = _RMSNorm(config.hidden)
        self.attn = _InternVideo2Attention(config)
        self.ls1 = _LayerScale(config.hidden)
        self.norm2 = _RMSNorm(config.hidden)
        self.mlp = _MLP(config)
        self.ls2 = _LayerScale(config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _InternVideo2Attention(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.q_norm = _RMSNorm(config.hidden)
        self.k_norm = _RMSNorm(config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(_attend(self.q_norm(q), self.k_norm(k), v, self.heads))


class _MLP(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _LayerScale(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * self.weight.float()).to(x.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of every token to all tokens of its clip. q, k, v and the result: [clips, tokens, hidden]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sinusoid_positions(frames: int, side: int, hidden: int) -> torch.Tensor:
    """UMT's positions for a clip of `frames` frames of side x side patches: fp32 [1, frames * side**2, hidden].

    The tower was trained on 14 x 14 patches, numbered through all frames. Other sizes are interpolated, frame by
    frame.
    """
    position = np.arange(frames * _PRETRAINED_SIDE**2)[:, None]
    angle = position / np.power(10000, 2 * (np.arange(hidden) // 2) / hidden)
    angle[:, 0::2] = np.sin(angle[:, 0::2])
    angle[:, 1::2] = np.cos(angle[:, 1::2])
    table = torch.tensor(angle, dtype=torch.float32, device="cpu")
    if side != _PRETRAINED_SIDE:
        table = table.reshape(frames, _PRETRAINED_SIDE, _PRETRAINED_SIDE, hidden).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)
    return table.reshape(1, frames * side**2, hidden)

"""VideoChat-Flash's vision towers, UMT-L and InternVideo2-1B, step by step over a checkpoint's tensors, for the oracle.

Both are plain vision transformers over all patches of a clip (4 frames) or of a picture. UMT has biases of queries and
values; InternVideo2 norms queries and keys, scales its residuals, and has a token of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

TRAINED_SIDE = 14
"""Patches along a side of the frames that UMT's positions were made for."""


@dataclass(frozen=True)
class Tower:
    """Either of the two.

    Attributes:
        tensors: by their released names, less what all have in common; the last block is not among them.
        heads: of attention.
        patch: pixels along a side.
    """

    tensors: Mapping[str, torch.Tensor]
    heads: int
    patch: int

    @property
    def umt(self) -> bool:
        return "cls_token" not in self.tensors

    def seen(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 [frames * patches, hidden] of normalised pixels [frames, 3, size, size], 1 or 4 frames."""
        top = "encoder." if self.umt else ""
        weight = self.tensors[f"{top}patch_embed.proj.weight"]
        rows = torch.stack([weight.flatten(1) @ patch for frame in pixels for patch in self._patches(frame)])
        state = rows + self.tensors[f"{top}patch_embed.proj.bias"]
        if self.umt:
            state = state + umt_positions(len(pixels), pixels.shape[-1] // self.patch, state.shape[-1])
        else:
            places = self.tensors["img_pos_embed" if len(pixels) == 1 else "pos_embed"][0]
            state = torch.cat([self.tensors["cls_token"][0], state]) + places
        for layer in range(sum(name.endswith(".mlp.fc1.weight") for name in self.tensors)):
            state = self._block(f"{top}blocks.{layer}.", state)
        if not self.umt:
            return state[1:]
        return _layer_norm(
            state, self.tensors["encoder.vision_layernorm.weight"], self.tensors["encoder.vision_layernorm.bias"], 1e-12
        )

    def _patches(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """[3 * patch * patch] of each patch, row by row."""
        size = self.patch
        return [
            frame[:, y : y + size, x : x + size].flatten()
            for y in range(0, frame.shape[1], size)
            for x in range(0, frame.shape[2], size)
        ]

    def _block(self, name: str, state: torch.Tensor) -> torch.Tensor:
        own = {key.removeprefix(name): value for key, value in self.tensors.items() if key.startswith(name)}
        one = torch.ones(())
        attended = self._attention(own, self._normed(own, "norm1", state))
        state = state + attended * own.get("ls1.weight", one)
        inner = self._normed(own, "norm2", state) @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"]
        gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        return state + (gelu @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]) * own.get("ls2.weight", one)

    def _normed(self, own: Mapping[str, torch.Tensor], name: str, state: torch.Tensor) -> torch.Tensor:
        if self.umt:
            return _layer_norm(state, own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)
        return _root_mean_square_norm(state, own[f"{name}.weight"])

    def _attention(self, own: Mapping[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
        q, k, v = (state @ weight.T for weight in own["attn.qkv.weight"].chunk(3))
        if self.umt:
            q, v = q + own["attn.q_bias"], v + own["attn.v_bias"]  # keys have none
        else:  # over all heads at once
            q = _root_mean_square_norm(q, own["attn.q_norm.weight"])
            k = _root_mean_square_norm(k, own["attn.k_norm.weight"])
        width = q.shape[1] // self.heads
        parts = []
        for head in range(self.heads):
            columns = slice(head * width, (head + 1) * width)
            weights = torch.softmax(q[:, columns] @ k[:, columns].T / math.sqrt(width), dim=-1)
            parts.append(weights @ v[:, columns])
        return torch.cat(parts, dim=1) @ own["attn.proj.weight"].T + own["attn.proj.bias"]


def umt_positions(frames: int, side: int, hidden: int) -> torch.Tensor:
    """fp32 [frames * side * side, hidden]: sines and cosines of a patch's number in the clip.

    Frames of another size than UMT was trained with have its positions resized, each frame alone.
    """
    number = torch.arange(frames * TRAINED_SIDE**2, dtype=torch.float64)[:, None]
    column = torch.arange(hidden)
    angle = number / 10000.0 ** (2 * (column // 2).double() / hidden)
    table = torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()
    if side != TRAINED_SIDE:
        raster = table.unflatten(0, (frames, TRAINED_SIDE, TRAINED_SIDE)).movedim(-1, 1)
        raster = torch.nn.functional.interpolate(raster, size=(side, side), mode="bicubic", align_corners=False)
        table = raster.movedim(1, -1).flatten(0, 2)
    return table


def _layer_norm(state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    centred = state - state.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def _root_mean_square_norm(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

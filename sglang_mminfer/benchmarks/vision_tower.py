"""The time of a vision tower of Qwen2.5-VL's shape, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sglang_mminfer.benchmarks import measure
from sglang_mminfer.benchmarks.cases import CELLS


@dataclass(frozen=True)
class VisionShape:
    """The shape of Qwen2.5-VL's vision tower: the blocks `whole` attend over whole frames, the other blocks in windows
    of 8 x 8 patches. 4 patches become a token."""

    depth: int = 32
    whole: tuple[int, ...] = (7, 15, 23, 31)
    hidden: int = 1280
    heads: int = 16
    intermediate: int = 3420
    patch: int = 1176  # 2 frames x 14 x 14 pixels x 3 colours
    out: int = 3584
    window: int = 64


def vision_seconds(frames: int, shape: VisionShape, device: str, cells: int = CELLS) -> float:
    """Seconds for `frames` frames of `cells` tokens through a tower of this shape. All blocks share random weights.

    Rotary embedding and the order of the windows are left out: both cost little beside the matrix products.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype) * size[-1] ** -0.5

    hidden, patches = shape.hidden, 4 * cells
    pixels, embed = weight(frames * patches, shape.patch), weight(hidden, shape.patch)
    ones = torch.ones(hidden, device=device, dtype=dtype)
    qkv, o = weight(3 * hidden, hidden), weight(hidden, hidden)
    gate_up, down = weight(2 * shape.intermediate, hidden), weight(hidden, shape.intermediate)
    merge, out = weight(4 * hidden, 4 * hidden), weight(shape.out, 4 * hidden)

    def run() -> torch.Tensor:
        x = F.linear(pixels, embed)
        for block in range(shape.depth):
            span = patches if block in shape.whole else min(shape.window, patches)
            parts = F.linear(F.rms_norm(x, (hidden,), ones, 1e-6), qkv).view(
                -1, span, 3, shape.heads, hidden // shape.heads
            )
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape), o)
            gate, up = F.linear(F.rms_norm(x, (hidden,), ones, 1e-6), gate_up).chunk(2, dim=1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.gelu(F.linear(F.rms_norm(x, (hidden,), ones, 1e-6).view(-1, 4 * hidden), merge)), out)

    return measure.timed(run, device).ms / 1e3


def vision(tokens: int, frames: int, shape: VisionShape, device: str) -> dict[str, Any]:
    """The tower's time for a video of `tokens` tokens, scaled from `frames` frames, and the size of its output."""
    all_frames = (tokens - 128) // CELLS
    return {
        "seconds": round(vision_seconds(frames, shape, device) * all_frames / frames, 4),
        "frames": all_frames,
        "frames_measured": frames,
        "embedding_mb": round(tokens * shape.out * 2 / 2**20),
        "note": "once for a prompt; once for every chunk where the embeddings exceed SGLANG_VLM_CACHE_SIZE_MB",
    }

"""The attention of vision towers on a CPU, without a mask of all patches by all patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_by_sequence(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND VisionSdpaAttention.forward: the same attention, one sequence of `cu_seqlens` at a time.

    SGLang's code builds a mask of all patches by all patches (and keeps 128 of them): 16 GB for the 131K patches of a
    video of 32K tokens, although each patch sees only its frame or window.
    """
    arguments = dict(zip(("q", "k", "v", "bsz", "cu_seqlens", "attention_mask"), args)) | kwargs
    cu_seqlens = arguments.get("cu_seqlens")
    masked = arguments.get("attention_mask") is not None or self.softmax_in_single_precision
    if cu_seqlens is None or masked or arguments["bsz"] != 1:
        return original(self, *args, **kwargs)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]  # [patches, heads, D]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[0]:
        return original(self, *args, **kwargs)
    starts, lengths = torch.tensor(bounds[:-1]), cu_seqlens.diff().cpu()
    out = torch.empty_like(q)
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        rows = starts[lengths == length][:, None] + torch.arange(length)  # [sequences, length]
        q_part, k_part, v_part = (tensor[rows].transpose(1, 2) for tensor in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out_part = scaled_dot_product_attention(q_part, k_part, v_part, scale=self.scale, enable_gqa=grouped)
        out[rows] = out_part.transpose(1, 2)
    return out

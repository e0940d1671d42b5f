"""The FlashAttention-4 executor: flash-attn-4's block-sparse forward over the work items of a plan.

Nothing here imports flash-attn-4 before a plan runs: that takes seconds, and only GPUs of two generations can use it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

VERSION = "4.0.0b36"
"""The only flash-attn-4 that is used. Its kernel classes have no stable interface, and `sm90.py` binds some of their
names anew, so another version may compile and still be wrong."""

CAPABILITIES = (90, 100, 103)
KEYS_OF_A_TILE = {64: (64, 128), 96: (64, 128), 128: (64, 128), 256: (64,)}
"""For each head dim the key tiles that shared memory has room for."""


def why_unavailable(device: torch.device, head_dim: int, block_k: int, dtype: torch.dtype) -> str | None:
    """Why this executor cannot run here, in words for the log; None if it can be tried."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in CAPABILITIES:
        return f"the GPU is sm_{major}{minor}, and there are kernels for sm_90, sm_100 and sm_103"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention computes in {dtype}, and there are kernels for bfloat16 and float16"
    return why_unsupported(head_dim, block_k) or why_not_installed()


def why_unsupported(head_dim: int, block_k: int) -> str | None:
    """Why there is no kernel for these sizes; None if there is one."""
    if head_dim not in KEYS_OF_A_TILE:
        return f"the head dim is {head_dim}, and there are kernels for {', '.join(map(str, KEYS_OF_A_TILE))}"
    if block_k not in KEYS_OF_A_TILE[head_dim]:
        fitting = " and ".join(map(str, KEYS_OF_A_TILE[head_dim]))
        return f"key tiles have {block_k} keys, and there are kernels for {fitting} at head dim {head_dim}"
    return None


def why_not_installed() -> str | None:
    """Why flash-attn-4 cannot be used, whatever the GPU; None if it can."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn-4 is not installed"
    if version != VERSION:
        return f"flash-attn-4 is {version}, and only {VERSION} is known"
    for module in ("flash_attn", "cutlass", "quack", "tvm_ffi"):
        if importlib.util.find_spec(module) is None:
            return f"flash-attn-4 lacks {module}"
    return None

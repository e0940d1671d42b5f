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
HEAD_DIMS = (64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


def why_unavailable(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why this executor cannot run here, in words for the log; None if it can be tried."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in CAPABILITIES:
        return f"the GPU is sm_{major}{minor}, and there are kernels for sm_90, sm_100 and sm_103"
    if head_dim not in HEAD_DIMS:
        return f"the head dim is {head_dim}, and there are kernels for {HEAD_DIMS}"
    if dtype not in DTYPES:
        return f"attention computes in {dtype}, and there are kernels for bfloat16 and float16"
    return why_not_installed()


def why_not_installed() -> str | None:
    """Why flash-attn-4 cannot be used, whatever the GPU; None if it can."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn-4 is not installed"
    if version != VERSION:
        return f"flash-attn-4 is {version}, and only {VERSION} is known"
    for module in ("flash_attn", "cutlass", "quack"):
        if importlib.util.find_spec(module) is None:
            return f"flash-attn-4 lacks {module}"
    return None

"""The executors by name, and the default for a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglang_mminfer.kernels import fa4, reference, torch_gather

logger = logging.getLogger(__name__)

# run(q, k_cache, v_cache, plan, sm_scale, out, lse), with the shapes that `torch_gather.run` documents
Executor = Callable[..., None]


def _fa4(*arguments: Any) -> None:
    from sglang_mminfer.kernels.fa4.launch import run  # flash-attn-4 is optional, and very slow to import

    run(*arguments)


def _triton(*arguments: Any) -> None:
    from sglang_mminfer.kernels.triton.launch import run  # Triton is slow to import, and only GPUs need it

    run(*arguments)


def _flashinfer(*arguments: Any) -> None:
    from sglang_mminfer.kernels.flashinfer_paged import run  # an optional dependency, and slow to import

    run(*arguments)


EXECUTORS: dict[str, Executor] = {
    "torch": torch_gather.run,
    "fa4": _fa4,
    "triton": _triton,
    "flashinfer": _flashinfer,
    "reference": reference.run,
}
CHOICES = ("auto", *EXECUTORS)

WIDE = (torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of a KV cache. Executors convert what they load to the dtype of q, which has every number of fp8."""

ruled_out: set[str] = set()
"""Executors that "auto" no longer means in this process, because a check found that they do not run or are wrong."""

_said: set[str] = set()


def why_unread(kv_dtype: torch.dtype, device: torch.device) -> str | None:
    """Why executors cannot read a KV cache of this dtype on this device; None if they can."""
    if kv_dtype not in (*WIDE, *FP8):
        return f"expected one of {', '.join(str(dtype).removeprefix('torch.') for dtype in (*WIDE, *FP8))}"
    if kv_dtype is torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "GPUs before sm_89 cannot convert fp8_e4m3"
    return None


def names_for(choice: str, device: torch.device, head_dim: int, block_k: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of the executors to try, the fastest first: `choice` itself; "auto" means, on a GPU, fa4 if it has
    kernels for the case, then triton, and torch elsewhere. The log says once why fa4 is not among them.

    Args:
        head_dim, block_k, dtype: of the attention; block_k keys make a key tile.
    """
    if choice != "auto":
        return (choice,)
    if device.type != "cuda":
        return ("torch",)
    why = "it was ruled out" if "fa4" in ruled_out else fa4.why_unavailable(device, head_dim, block_k, dtype)
    if why is None:
        return ("fa4", "triton")
    if why not in _said:
        _said.add(why)
        logger.info("mminfer: sparse attention runs on the triton executor; not on fa4, because %s", why)
    return ("triton",)


def name_for(choice: str, device: torch.device, head_dim: int, block_k: int, dtype: torch.dtype) -> str:
    """The first of `names_for`."""
    return names_for(choice, device, head_dim, block_k, dtype)[0]

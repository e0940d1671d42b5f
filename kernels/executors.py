"""The executors by name, and the default for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_mminfer.kernels import reference, torch_gather

# run(q, k_cache, v_cache, plan, sm_scale, out, lse), with the shapes that `torch_gather.run` documents
Executor = Callable[..., None]


def _triton(*arguments: Any) -> None:
    from sglang_mminfer.kernels.triton.launch import run  # Triton is slow to import, and only GPUs need it

    run(*arguments)


def _flashinfer(*arguments: Any) -> None:
    from sglang_mminfer.kernels.flashinfer_paged import run  # an optional dependency, and slow to import

    run(*arguments)


EXECUTORS: dict[str, Executor] = {
    "torch": torch_gather.run,
    "triton": _triton,
    "flashinfer": _flashinfer,
    "reference": reference.run,
}
CHOICES = ("auto", *EXECUTORS)


def name_for(choice: str, device: torch.device) -> str:
    """The name of the executor: `choice` itself; "auto" means triton on a GPU and torch elsewhere."""
    if choice != "auto":
        return choice
    return "triton" if device.type == "cuda" else "torch"

"""Copies small index arrays to the device: one copy for all of them, and the host does not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(device: torch.device, *arrays: Any) -> Sequence[torch.Tensor]:
    """numpy integer arrays -> int32 tensors of the same shapes on `device`."""
    arrays = tuple(np.asarray(array) for array in arrays)
    sizes = [array.size for array in arrays]
    if device.type == "cuda" and torch.cuda.is_available():  # tests plan for cards that are not there
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
        flat = host.numpy()
    else:
        flat = np.empty(sum(sizes), dtype=np.int32)
        host = torch.from_numpy(flat)
    np.concatenate([array.ravel() for array in arrays], out=flat, casting="same_kind")
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part if array.ndim == 1 else part.view(array.shape) for part, array in zip(parts, arrays)]

"""Copies small index arrays to the device: one copy for all of them, and the host does not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(device: torch.device, *arrays: Any) -> Sequence[torch.Tensor]:
    """numpy integer arrays -> int32 tensors of the same shapes on `device`."""
    flat = np.concatenate([np.asarray(array).ravel() for array in arrays]).astype(np.int32, copy=False)
    host = torch.from_numpy(flat)
    if device.type == "cuda" and torch.cuda.is_available():  # tests plan for cards that are not there
        host = host.pin_memory()
    parts = host.to(device, non_blocking=True).split([np.size(array) for array in arrays])
    return [part.view(np.shape(array)) for part, array in zip(parts, arrays)]

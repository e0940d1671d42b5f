"""Records of batches whose densities the device computes: told in their order, once these are known. Nobody waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from sglang_mminfer.serving.trace import PrefillRecord

Densities = Sequence[torch.Tensor | float]
"""One for each layer that ran sparse: a scalar on the device, or a number."""


def mean_density(densities: Densities, sparse_layers: int) -> float | None:
    """The mean over the layers that ran sparse; None if the host does not know it of all."""
    on_host = [density for density in densities if not isinstance(density, torch.Tensor)]
    return fmean(on_host) if on_host and len(on_host) == sparse_layers else None


class LateRecords:
    """
    Args:
        tell: takes the records of one batch.
    """

    def __init__(self, tell: Callable[[list[PrefillRecord]], None]) -> None:
        self._tell = tell
        self._batches: deque[_Batch] = deque()

    def put(self, records: list[PrefillRecord], densities: Sequence[Densities]) -> None:
        """Takes the records of one batch, and the densities of each."""
        self._batches.append(_Batch(records, densities))
        self.tell_known()

    def tell_known(self) -> None:
        """Tells what is known by now."""
        while self._batches and self._batches[0].is_known:
            self._tell(self._batches.popleft().records())


class _Batch:
    """Records, and the densities of the layers of each on their way to the host."""

    def __init__(self, records: list[PrefillRecord], densities: Sequence[Densities]) -> None:
        self._records, self._densities = records, densities
        self._copied: Any = None
        scalars = [x for x in chain.from_iterable(densities) if isinstance(x, torch.Tensor)]
        self._done: Any = None
        if scalars:
            self._copied = torch.stack(scalars).to("cpu", non_blocking=True)  # into pinned memory
            if scalars[0].device.type != "cpu":
                self._done = torch.get_device_module(scalars[0].device).Event()
                self._done.record()

    @property
    def is_known(self) -> bool:
        return self._done is None or self._done.query()

    def records(self) -> list[PrefillRecord]:
        if self._copied is not None:
            copied = iter(self._copied.tolist())
            for record, own in zip(self._records, self._densities, strict=True):
                numbers = [next(copied) if isinstance(x, torch.Tensor) else x for x in own]
                record.density = mean_density(numbers, record.sparse_layers)
        return self._records

"""A card that is not there, of which no work may ask anything.

In torch's fake mode a tensor says which device it is on and what shape it has, and holds nothing: whatever the host
would have to ask a card for raises, and so does whatever mixes tensors of the host with those of a card. Torch's copies
to a card wait, too, if they are not told otherwise: fake mode lets them pass, so they are looked for here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class WaitsForCopy(Exception):
    """The host would wait until the card has done all that it was told before, and a copy."""


class _Copies(TorchDispatchMode):
    """Raises where a value of the host goes to a card and the host waits for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        out = func(*args, **kwargs)
        value = None
        if name == "aten::copy_":  # also x[0] = 1
            value, waits = args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name == "aten::_to_copy":
            value, waits = args[0], not kwargs.get("non_blocking", False)
        elif name in ("aten::index_put_", "aten::index_put"):  # x[indices] = 1
            value, waits = args[2], not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if value is not None and waits and value.device.type == "cpu" and out.device.type == "cuda":
            raise WaitsForCopy(f"{func}: a value of the host goes to the card")
        return out


@contextmanager
def absent_card() -> Iterator[None]:
    """Tensors may be on "cuda", and nobody may wait for it."""
    with FakeTensorMode(), _Copies():
        yield

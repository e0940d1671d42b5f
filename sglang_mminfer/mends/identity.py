"""The identity of a medium: its hash covers everything that decides what a model sees, not its pixels alone.

SGLang hashes the features. Two media with equal patches in different arrangements (a blank page upright and on its
side, a black image and a black video) are then the same to the radix cache and to the cache of embeddings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends.requests import media_in

KEY = "mminfer_arrangement"
"""Key in an item's `model_specific_data`: a digest of everything except the features, not yet mixed into its hash."""

_MOST = 4096  # elements that are read of a value; a larger one is data, and its shape counts


def add(output: Any, request: Any) -> None:
    """Gives each item of a processor's output its digest, and a new hash to each item that SGLang has hashed already.

    A hash that the client or a family's own processor sets stays as it is: it covers everything that counts.

    Args:
        output: SGLang's MultimodalProcessorOutput; changed in place.
        request: the GenerateReqInput that it was made for; None if no client can have sent hashes with it.
    """
    if not mends.active("hash_of_arrangement") or _brings_hashes(request):
        return
    rehashed = False
    for item in output.mm_items:
        if item.hash is not None and item.pad_value is None:
            continue
        item.model_specific_data[KEY] = arrangement(item)
        if item.pad_value is not None:
            _mix(item)
            rehashed = True
    if rehashed and output.padded_input_ids is not None:
        output.padded_input_ids = type(output).build_padded_input_ids(output.input_ids, output.mm_items)


def _brings_hashes(request: Any) -> bool:
    media = [medium for kind in ("image", "video", "audio") for medium in media_in(request, kind)]
    return any(isinstance(medium, dict) and medium.get("hash") is not None for medium in media)


def set_pad_value(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND MultimodalDataItem.set_pad_value, in the process that hashes the features."""
    original(self, *args, **kwargs)
    if KEY in self.model_specific_data:
        _mix(self)


def _mix(item: Any) -> None:
    """Mixes the digest into the item's hash, and removes it so that this happens once."""
    digest = item.model_specific_data.pop(KEY)
    mixed = hashlib.sha256(item.hash.to_bytes(8, "big") + digest).digest()
    item.set_hash(int.from_bytes(mixed[:8], "big"))


def arrangement(item: Any) -> bytes:
    """A digest (16 bytes) of an item's modality, its features' shapes, and its small values: grids, sizes, seconds."""
    from sglang_mminfer.modality import items

    lines = [item.modality.name, _shape(item.feature)]
    for name, value in sorted(item.model_specific_data.items()):
        if name == items.KEY:  # where a raster belongs counts within one request, so it is no part of the identity
            value = [place[3:] for place in value]
        if name != KEY:
            lines.append(f"{name}={_written(value)}")
    return hashlib.sha256("\n".join(lines).encode()).digest()[:16]


def _shape(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shape, value))}]"
    return f"{getattr(value, 'dtype', '')}{tuple(getattr(value, 'shape', ()))}"


def _written(value: Any) -> str:
    """The text of a value that says how a medium is laid out; for any other value the name of its type."""
    if isinstance(value, str | int | float | bool | bytes | None):
        return repr(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        on_host = getattr(getattr(value, "device", None), "type", "cpu") == "cpu"
        return f"{tuple(value.shape)}{value.tolist() if on_host and math.prod(value.shape) <= _MOST else ''}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value[:_MOST]))}]{len(value)}"
    return type(value).__name__

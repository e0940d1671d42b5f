"""The identity of a medium: all that decides what a model sees, and not its pixels alone.

SGLang hashes the features, so that two media of equal patches in another arrangement (a blank page upright and
lying, a black video) are one to the radix cache and to the cache of embeddings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends.requests import media_in

KEY = "mminfer_arrangement"
"""In an item's `model_specific_data`: a digest of all that is no feature, which its hash has yet to take in."""

_MOST = 4096  # elements of a value that are read; what is larger is data, not arrangement


def add(output: Any, request: Any) -> None:
    """Gives the items of a processor's output the digest, and those that SGLang has hashed a new hash.

    A hash that the client or a family's own processor brings is left alone: it is of all that counts.
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
    media = [one for kind in ("image", "video", "audio") for one in media_in(request, kind)]
    return any(isinstance(one, dict) and one.get("hash") is not None for one in media)


def set_pad_value(original: Callable[[Any], None], self: Any) -> None:
    """AROUND MultimodalDataItem.set_pad_value, in whatever process hashes the features."""
    original(self)
    if KEY in self.model_specific_data:
        _mix(self)


def _mix(item: Any) -> None:
    """Takes the digest into the hash, once."""
    digest = item.model_specific_data.pop(KEY)
    mixed = hashlib.sha256(item.hash.to_bytes(8, "big") + digest).digest()
    item.set_hash(int.from_bytes(mixed[:8], "big"))


def arrangement(item: Any) -> bytes:
    """A digest of an item's modality, the shape of its features, and its small values (grids, sizes, seconds)."""
    from sglang_mminfer.modality import items

    told = [item.modality.name, _shape(item.feature)]
    for name, value in sorted(item.model_specific_data.items()):
        if name == items.KEY:  # a frame that comes twice, or in two videos, is one
            value = [place[3:] for place in value]
        if name != KEY:
            told.append(f"{name}={_written(value)}")
    return hashlib.sha256("\n".join(told).encode()).digest()[:16]


def _shape(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shape, value))}]"
    return f"{getattr(value, 'dtype', '')}{tuple(getattr(value, 'shape', ()))}"


def _written(value: Any) -> str:
    """A value that says how a medium is laid out; of anything else its type."""
    if isinstance(value, str | int | float | bool | bytes | None):
        return repr(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        on_host = getattr(getattr(value, "device", None), "type", "cpu") == "cpu"
        return f"{tuple(value.shape)}{value.tolist() if on_host and math.prod(value.shape) <= _MOST else ''}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value[:_MOST]))}]{len(value)}"
    return type(value).__name__

"""Pictures as every viewer shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load(original: Callable[..., Any], data: Any, modality: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of BaseMultimodalProcessor._load_single_item for a picture: RGB, upright."""
    return original(data, modality, *args, **kwargs)

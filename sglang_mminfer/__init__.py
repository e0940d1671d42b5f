"""Modality-aware permuted sparse prefill for long image, video and text conversations in SGLang.

Light at import: SGLang loads this package in every one of its processes before it knows whether the plugin
is wanted, so the public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "sglang_mminfer.modality.segments": ("Modality", "ModalityMap", "Segment", "VisionGrid"),
    "sglang_mminfer.patterns.a_shape": ("AShape",),
    "sglang_mminfer.patterns.adaptive": ("Adaptive",),
    "sglang_mminfer.patterns.basis": ("Basis",),
    "sglang_mminfer.patterns.boundary": ("Boundary2D", "QBoundary"),
    "sglang_mminfer.patterns.dense": ("Dense",),
    "sglang_mminfer.patterns.dilated": ("Dilated",),
    "sglang_mminfer.patterns.grid": ("Grid",),
    "sglang_mminfer.patterns.pooled_blocks": ("PooledBlocks",),
    "sglang_mminfer.patterns.pooled_queries": ("PooledQueries",),
    "sglang_mminfer.patterns.tri_shape": ("TriShape",),
    "sglang_mminfer.patterns.vertical_slash": ("VerticalSlash",),
    "sglang_mminfer.patterns.mask": ("pattern_mask",),
    "sglang_mminfer.head_config": ("HeadConfig",),
    "sglang_mminfer.prefill": ("SparsePrefillWithPagedKVCacheWrapper",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - grouped by room
    "Modality",
    "ModalityMap",
    "Segment",
    "VisionGrid",
    "AShape",
    "Adaptive",
    "Basis",
    "Boundary2D",
    "Dense",
    "Dilated",
    "Grid",
    "PooledBlocks",
    "PooledQueries",
    "QBoundary",
    "TriShape",
    "VerticalSlash",
    "pattern_mask",
    "HeadConfig",
    "SparsePrefillWithPagedKVCacheWrapper",
]

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig
    from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
    from sglang_mminfer.patterns.a_shape import AShape
    from sglang_mminfer.patterns.adaptive import Adaptive
    from sglang_mminfer.patterns.basis import Basis
    from sglang_mminfer.patterns.boundary import Boundary2D, QBoundary
    from sglang_mminfer.patterns.dense import Dense
    from sglang_mminfer.patterns.dilated import Dilated
    from sglang_mminfer.patterns.grid import Grid
    from sglang_mminfer.patterns.mask import pattern_mask
    from sglang_mminfer.patterns.pooled_blocks import PooledBlocks
    from sglang_mminfer.patterns.pooled_queries import PooledQueries
    from sglang_mminfer.patterns.tri_shape import TriShape
    from sglang_mminfer.patterns.vertical_slash import VerticalSlash
    from sglang_mminfer.prefill import SparsePrefillWithPagedKVCacheWrapper


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

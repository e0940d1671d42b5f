"""Any model that says where its media stand but not how they are laid out: each span a segment, no grid.

Enough for what goes by modality (the boundaries, A-shape, tri-shape, vertical-slash); grid patterns find no
cells here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_mminfer.modality.items import spans_of
from sglang_mminfer.modality.segments import Modality, Segment


def segments(item: Any, modality: Modality, name: str, argument: str) -> Iterator[tuple[Segment, str]]:
    """One segment for each span of the item, with the name an error should use."""
    for span in spans_of(item, name):
        yield Segment(modality, span.start, span.stop), span.name

"""Whether a pattern leaves anything out of a chunk whose media have no raster.

A row that cannot be placed on a raster sees everything, so a chunk behind such a medium may be dense in every head.
"""

from __future__ import annotations

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern, row_classes
from sglang_mminfer.patterns.index import Scope


def lacks_raster(modality_map: ModalityMap) -> bool:
    """Whether an image or a video has no raster."""
    return any(s.modality is not Modality.TEXT and s.grid is None for s in modality_map.segments)


def leaves_out(head: HeadPattern, modality_map: ModalityMap, start: int, stop: int) -> bool:
    """Whether some of the rows [start, stop) are not told to see everything. Windows do not count, however wide."""
    for row_class in row_classes(head):
        for keys, pattern in row_class.pairs:
            scope = Scope(modality_map, stop, row_class.rows, keys, row_class.text_rule)
            rows, whole = scope.row_members.clip(start, stop), pattern.index(scope).whole_rows
            if len(rows if whole is None else rows - whole):
                return True
    return False

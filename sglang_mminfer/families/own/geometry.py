"""The families that this package brings itself: every item says where it belongs in its picture or video.

An item is one frame of a video, or one view of a picture, as a span of `rows * cols` tokens in raster order and
`tail` tokens without a cell. Items 0 to n - 1 of a medium stand one behind the other, and what is between them (a
separator) belongs to the medium. If a model ends each row with a newline token, that token is the last column of the
raster, so the stride of a row is the number of columns with the newline. If a model merges a clip's tokens until no
raster is left, there is one row, and only the stride of the clip has a meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from sglang_mminfer.families.base import MediaItem, Reader
from sglang_mminfer.modality.items import KEY, GeometryError


@dataclass(frozen=True)
class PlacedReader(Reader):
    """The reader of these families. It takes only items that our processors made.

    Attributes:
        merged: whether the model merges tokens until no raster is left: every item has one row.
    """

    merged: bool = False

    @property
    def has_raster(self) -> bool:
        return not self.merged

    def of_item(self, one: MediaItem) -> NoReturn:
        raise GeometryError("grid_mismatch", f"{one.label}: expected {KEY}, which says where its rasters belong")

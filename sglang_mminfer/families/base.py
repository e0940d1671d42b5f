"""What a family says of its models: subclass `Family` in a module of this folder, and the plugin knows the family.

SGLang is imported inside methods only: the modules of all families are imported together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from sglang_mminfer.families import placed
from sglang_mminfer.modality.items import is_placed
from sglang_mminfer.modality.segments import Modality, Segment


class MediaItem(NamedTuple):
    """One of SGLang's media items that the model sees, its modality, and the words an error calls it by."""

    item: Any
    modality: Modality
    label: str


LabelledSegment = tuple[Segment, str]
"""A segment, and the words an error calls it by."""


@dataclass(frozen=True)
class Reader(ABC):
    """Reads where the media of a request stand and how they are laid out, for the models of one layout.

    Subclasses are frozen dataclasses: their fields are what a config says of the layout, and readers of one layout are
    equal, since a map is kept together with the reader that made it.
    """

    @property
    def has_raster(self) -> bool:
        """False where vision tokens are merged until they have neither rows nor columns."""
        return True

    def segments(self, items: Sequence[MediaItem]) -> Iterator[LabelledSegment]:
        """One segment for each raster of a medium, in any order; `items` are all media of a request.

        Raises:
            GeometryError: naming the item, what it has and what was expected.
        """
        yield from placed.segments([one for one in items if is_placed(one.item)], self.has_raster)
        for one in items:
            if not is_placed(one.item):
                yield from self.of_item(one)

    @abstractmethod
    def of_item(self, one: MediaItem) -> Iterable[LabelledSegment]:
        """The segments of an item that SGLang's own processor, or a client, made. Errors: as `segments`."""


class Family(ABC):
    """One family of models. A subclass that names its `model_types` is registered.

    Attributes:
        model_types: of the configs of its models.
        why: what sets its layout apart, in a sentence.
        processors: names of SGLang's processor classes that `processor` may take the place of.
        mend: the entry of `mends.MENDS` that `processor` and `model` belong to: they are asked only while it is on.
            None where they ask for several themselves, or there are none.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    why: ClassVar[str] = ""
    processors: ClassVar[tuple[str, ...]] = ()
    mend: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "model_types" in vars(cls):
            REGISTERED.append(cls)

    @property
    def name(self) -> str:
        """That of its file or folder."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def geometry(self, hf_config: Any) -> Reader:
        """What reads the media of a model with this config."""

    def processor(self, base: type, hf_config: Any) -> type | None:
        """Our processor in place of one of SGLang's that `processors` names; None to leave SGLang's."""
        return None

    def model(self, base: type, architecture: str) -> type | None:
        """Our model class in place of SGLang's for an architecture; None to leave SGLang's."""
        return None

    def check_features(self, one: MediaItem, shape: tuple[int, ...], tokens: int, hf_config: Any) -> None:
        """Holds a client's features (`processor_output`) against all that the model's encoder takes for granted.

        Args:
            one: the item that holds them.
            shape: of the features.
            tokens: of the item in the prompt.

        Raises:
            ValueError: naming the item, what it has and what was expected.
        """
        raise ValueError(
            f"{one.label}: processor_output is not taken for models of this family ({self.name}); send pictures and "
            "videos, or precomputed_embedding"
        )


REGISTERED: list[type[Family]] = []
"""Subclasses of `Family` that name model types, as their modules are imported; see `families.known`."""

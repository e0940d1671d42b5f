"""The base of all families: subclass `Family` in a module of this folder, and the plugin knows the family.

Families import SGLang inside methods only, because the modules of all families are imported together.
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
    """One of SGLang's media items that the model sees, its modality, and its name in errors."""

    item: Any
    modality: Modality
    label: str


LabelledSegment = tuple[Segment, str]
"""A segment, and its name in errors."""


@dataclass(frozen=True)
class Reader(ABC):
    """Reads where the media of a request stand and how they are laid out, for the models of one layout.

    Subclasses are frozen dataclasses whose fields hold what a config says about the layout, so that readers of one
    layout are equal: a cached map is used again only for an equal reader.
    """

    @property
    def has_raster(self) -> bool:
        """False if the model merges vision tokens until they have neither rows nor columns."""
        return True

    def segments(self, items: Sequence[MediaItem]) -> Iterator[LabelledSegment]:
        """One segment for each raster of a medium, in any order.

        Args:
            items: all media of a request.

        Raises:
            GeometryError: naming the item, what it has and what was expected.
        """
        yield from placed.segments([one for one in items if is_placed(one.item)], self.has_raster)
        for one in items:
            if not is_placed(one.item):
                yield from self.of_item(one)

    @abstractmethod
    def of_item(self, one: MediaItem) -> Iterable[LabelledSegment]:
        """The segments of an item that SGLang's own processor or a client made. Errors: as `segments`."""


class Family(ABC):
    """One family of models. A subclass that names its `model_types` is registered.

    Attributes:
        model_types: the `model_type` of its models' configs.
        why: one sentence that says how its layout differs from others.
        processors: names of SGLang's processor classes that `processor` may replace.
        mend: the name in `mends.MENDS` of the mend that `processor` and `model` belong to: they are called only if it
            is on. None if they belong to none, or check their mends themselves.
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
        """The name of its file or folder."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def geometry(self, hf_config: Any) -> Reader:
        """The reader of media for a model with this config."""

    def processor(self, base: type, hf_config: Any) -> type | None:
        """Our class in place of SGLang's processor class `base`, which `processors` names; None to keep SGLang's."""
        return None

    def model(self, base: type, architecture: str) -> type | None:
        """Our class in place of SGLang's model class `base` for an architecture; None to keep SGLang's."""
        return None

    def note(self, dense_backend: str) -> str | None:
        """What whoever starts a server must know of this family's prompts above that dense backend; None: nothing."""
        return None

    def check_features(self, one: MediaItem, shape: tuple[int, ...], tokens: int, hf_config: Any) -> None:
        """Checks a client's features (`processor_output`) for everything that the model's encoder takes for granted.

        Args:
            one: the item that holds the features.
            shape: the shape of the features.
            tokens: how many tokens of the prompt belong to the item.

        Raises:
            ValueError: naming the item, what it has and what was expected.
        """
        raise ValueError(
            f"{one.label}: processor_output is not taken for models of this family ({self.name}); send pictures and "
            "videos, or precomputed_embedding"
        )


REGISTERED: list[type[Family]] = []
"""The subclasses of `Family` that name model types. They get here when their modules are imported; see `known`."""

"""What a pattern is. A pattern is one file of this folder with one class in it; nothing else lists it.

    @dataclass(frozen=True)
    class AShape(Pattern, kind="a_shape"):
        sink: Count
        local: Size

The class says twice which keys a row sees: `visible` in the plainest words, for small inputs, and `index` in the form
that planning cuts into tiles. Tests hold the second against the first. All else follows from the class: the checks of
its constructor, its JSON, its name in reports, and its row in the documents.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch

from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.ladder import Prompt
from sglang_mminfer.patterns.pair import Pair

Count = Annotated[int, msgspec.Meta(ge=0)]
Size = Annotated[int, msgspec.Meta(ge=1)]
LARGEST = 2**31 - 1  # positions are int32 in the index tables
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]

_BY_KIND: dict[str, type[Pattern]] = {}
_PALETTE = ("#eeca3b", "#9d755d", "#ff9da6", "#1f77b4", "#17becf", "#bcbd22", "#8c6d31", "#d67195")


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys a row sees, besides k <= q. Sizes are tokens.

    A subclass writes its docstring for the documents: the first paragraph says which keys are visible.
    """

    kind: ClassVar[str]
    """Its name in head configs."""
    colour: ClassVar[str]
    """In reports."""
    reasons: ClassVar[tuple[str, ...]] = ()
    """Why some rows see every key: the names that `PairIndex.whole` may use, in the order in which they are looked
    for."""
    looks_ahead: ClassVar[tuple[str, ...]] = ()
    """Fields that let a row's keys depend on what comes after the row, unless they are 0."""

    def __init_subclass__(cls, kind: str | None = None, colour: str | None = None, **rest: Any) -> None:
        """
        Args:
            kind: None for a class that only gathers what several patterns share. colour: None: one by the kind.
        """
        super().__init_subclass__(**rest)
        if kind is None:
            return
        if kind in _BY_KIND:
            raise TypeError(f"{cls.__name__}: kind {kind!r} is taken by {_BY_KIND[kind].__name__}")
        cls.kind, cls.colour = kind, colour or _PALETTE[zlib.crc32(kind.encode()) % len(_PALETTE)]
        _BY_KIND[kind] = cls

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            value = getattr(self, field.name)
            if not field.allows(value):
                raise ValueError(f"{type(self).__name__}.{field.name}: expected {field.expected}, got {value!r}")
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{type(self).__name__}.{field.name}: expected an integer <= {LARGEST}, got {value}")

    @abstractmethod
    def visible(self, pair: Pair) -> torch.Tensor:
        """The exact rule: bool [rows, keys], right for the rows and the keys of the pair's classes. Keys after a row
        may be among them; the caller leaves them out. Quadratic; may use nothing that `index` uses."""

    @abstractmethod
    def index(self, scope: Scope) -> PairIndex:
        """What planning cuts into tiles: at least what `visible` says."""

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterable[tuple[str, Pattern]]:
        """What a search tries for one head: names, the same for every head of a prompt, and patterns."""
        return ()

    @property
    def label(self) -> str:
        """A few characters for a cell of a report."""
        return f"{self.kind} {','.join(str(getattr(self, field.name)) for field in fields_of(type(self)))}"

    @property
    def raster_stride(self) -> str | None:
        """Stride of the rasters that it reads; None where it reads none."""
        return None

    @property
    def line_stride(self) -> str | None:
        """Stride of the lines through rasters that its rows follow; None where they follow none."""
        return None

    @property
    def basis_rank(self) -> int:
        """How many rows of a basis it reads; 0 where it reads none."""
        return 0

    def plain(self, rows: Modality) -> Pattern:
        """What does the same to rows of one modality, by its simplest name."""
        return self


@dataclass(frozen=True)
class Field:
    """One field of a pattern. type: int, float, bool or a Literal, without bounds; a float is a share: above 0 and at
    most 1. least: of an integer."""

    name: str
    type: Any
    least: int | None
    default: Any

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal."""
        return typing.get_args(self.type)

    @property
    def expected(self) -> str:
        """The values that it may have, in words."""
        if self.choices:
            return " or ".join(f'"{choice}"' for choice in self.choices)
        if self.type is float:
            return "a number above 0 and at most 1"
        return "true or false" if self.type is bool else f"an integer >= {self.least}"

    def allows(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if self.type is float:
            return isinstance(value, int | float) and 0 < value <= 1
        return isinstance(value, int) and self.least is not None and value >= self.least


@cache
def fields_of(pattern: type[Pattern]) -> tuple[Field, ...]:
    """The fields of a pattern class, in order.

    Raises:
        TypeError: a field that is neither a bounded integer, nor a share, nor a flag, nor a choice among words.
    """
    hints = typing.get_type_hints(pattern, include_extras=True)
    found = []
    for field in dataclasses.fields(pattern):
        hint, least = hints[field.name], None
        is_share = hint == Share
        if typing.get_origin(hint) is Annotated:
            hint, *notes = typing.get_args(hint)
            bounds = (note.ge for note in notes if isinstance(note, msgspec.Meta))
            least = next((int(bound) for bound in bounds if bound is not None), None)
        known = hint is bool or is_share or typing.get_origin(hint) is Literal or (hint is int and least is not None)
        if not known:
            raise TypeError(
                f"{pattern.__name__}.{field.name}: expected a bounded integer, a Share, a bool or a Literal"
            )
        found.append(Field(field.name, hint, least, field.default))
    return tuple(found)


@cache
def kinds() -> dict[str, type[Pattern]]:
    """Every pattern class by its kind, the simplest first: those with the fewest fields, then by name."""
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_BY_KIND.items(), key=lambda item: (len(fields_of(item[1])), item[0])))

"""Families register themselves: a file in the folder is all that a new one needs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_mminfer import Modality, ModalityMap, Segment, VisionGrid, families, mends
from sglang_mminfer.families import base, maps
from sglang_mminfer.families.own.family import OwnFamily

NEWCOMER = """
from dataclasses import dataclass
from sglang_mminfer.families.base import Family, Reader
from sglang_mminfer.modality.items import one_segment, spans_of

@dataclass(frozen=True)
class Square(Reader):
    side: int
    def of_item(self, one):
        for span in spans_of(one.item, one.label):
            yield one_segment([span], self.side, self.side, one.modality)

class Newcomer(Family):
    model_types = ("newcomer",)
    why = "It is new."
    processors = ("NewcomerProcessor",)
    def geometry(self, hf_config):
        return Square(hf_config.side)
    def processor(self, base, hf_config):
        return type("Ours", (base,), {})
    def model(self, base, architecture):
        return type(base.__name__, (base,), {}) if architecture == "Newcomer" else None
"""


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The families with one more file in their folder."""
    families.known()  # so that what registers below is the newcomer alone
    (tmp_path / "newcomer.py").write_text(NEWCOMER)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(base, "REGISTERED", list(base.REGISTERED))
    families.known.cache_clear()
    importlib.invalidate_caches()
    yield
    families.known.cache_clear()
    del sys.modules["sglang_mminfer.families.newcomer"], families.newcomer


def test_a_file_is_a_family(newcomer: None, note: Callable[[Any], None]) -> None:
    from sglang_mminfer.families import processors

    config = SimpleNamespace(model_type="newcomer", side=2)
    reader = maps.reader_of(config)
    assert reader is not None and reader.has_raster
    media = SimpleNamespace(mm_items=[SimpleNamespace(modality="IMAGE", offsets=[(1, 4)], model_specific_data={})])
    assert maps.map_from_mm_inputs(media, 5, reader) == ModalityMap(
        [Segment(Modality.TEXT, 0, 1), Segment(Modality.IMAGE, 1, 5, VisionGrid(1, 2, 2, (1,)))]
    )
    theirs = type("NewcomerProcessor", (), {})
    assert processors.adapted(theirs, config).__name__ == "Ours"
    assert processors.adapted(type("OtherProcessor", (), {}), config).__name__ == "OtherProcessor"
    note(SimpleNamespace(attention_backend="mminfer"))
    ours, architecture = processors.adapt_model((theirs, "Newcomer")) or (None, "")
    assert ours is not None and ours.__mro__[1] is theirs and architecture == "Newcomer"
    assert processors.adapt_model((theirs, "Oldcomer")) is None


def test_maps_of_two_layouts_are_not_taken_for_each_other(newcomer: None) -> None:
    """The map that is kept on a request is that of its reader."""
    media = SimpleNamespace(mm_items=[SimpleNamespace(modality="IMAGE", offsets=[(1, 4)], model_specific_data={})])
    two, again, one = (maps.reader_of(SimpleNamespace(model_type="newcomer", side=side)) for side in (2, 2, 1))
    kept = maps.cached_map(media, 5, two)
    assert maps.cached_map(media, 5, again) is kept
    assert maps.cached_map(media, 5, one) != kept != maps.cached_map(media, 5, None)


def test_nothing_is_imported_before_a_family_is_asked_for() -> None:
    program = (
        "import sys; before = set(sys.modules); import sglang_mminfer.families\n"
        "print([m for m in set(sys.modules) - before if m.partition('.')[0] not in sys.stdlib_module_names])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(eval(done.stdout)) == ["sglang_mminfer", "sglang_mminfer.families"]


def test_every_family_is_whole() -> None:
    types = [model_type for family in families.known() for model_type in family.model_types]
    assert len(types) == len(set(types)), "two families of one model type"
    assert len({family.name for family in families.known()}) == len(families.known()), "one file, two families"
    for family in families.known():
        assert family.why.endswith("."), family.name
        assert family.mend is None or mends.named(family.mend)
        if isinstance(family, OwnFamily):
            assert family.architectures and "{%" in family.chat_template(_config_of(family)), family.name


def _config_of(family: OwnFamily) -> Any:
    return SimpleNamespace(text_config=SimpleNamespace(model_type="qwen2"))

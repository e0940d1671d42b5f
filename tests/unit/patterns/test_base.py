"""What every pattern class must be, whoever wrote it; and that its two accounts of itself share nothing."""

from __future__ import annotations

import ast
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sglang_mminfer
from sglang_mminfer import Adaptive, Dense, Grid
from sglang_mminfer.patterns import grid
from sglang_mminfer.patterns.__main__ import table
from sglang_mminfer.patterns.base import LARGEST, Pattern, fields_of, kinds
from sglang_mminfer.patterns.boundary import Boundary2D, QBoundary
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.ladder import RANKS, STRIDES, Prompt
from sglang_mminfer.patterns.pair import Pair
from support import TEXT, VISION, conversation, maps, patterns_of_kind

every_kind = pytest.mark.parametrize("kind", kinds())
PROMPTS = [
    Prompt(tokens, strides, {"frame": [3, 1]}, RANKS if strides else ())
    for tokens in (1, 700, 20_000)
    for strides in ((), STRIDES)
]


# ---- the registry ------------------------------------------------------------------------------------------


@every_kind
def test_a_pattern_is_one_file_and_one_public_name(kind: str) -> None:
    cls = kinds()[kind]
    assert cls.kind == kind and cls.__module__ == f"sglang_mminfer.patterns.{kind}"
    assert getattr(sglang_mminfer, cls.__name__) is cls and cls.__name__ in sglang_mminfer.__all__
    assert dataclasses.is_dataclass(cls) and cls.__hash__ is not None


def test_the_simplest_come_first_and_dense_is_the_simplest() -> None:
    sizes = [len(fields_of(cls)) for cls in kinds().values()]
    assert sizes == sorted(sizes) and next(iter(kinds())) == "dense"


def test_a_kind_that_is_taken_is_refused() -> None:
    with pytest.raises(TypeError, match="Second: kind 'grid' is taken by Grid"):

        class Second(Pattern, kind="grid"):
            pass

    assert kinds()["grid"] is Grid


def test_a_field_without_bounds_is_refused() -> None:
    @dataclass(frozen=True)
    class Loose(Dense):
        depth: int

    with pytest.raises(TypeError, match=r"Loose\.depth: expected a bounded integer, a Share, a bool or a Literal"):
        Loose(3)


# ---- fields ------------------------------------------------------------------------------------------------


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_values_beside_the_bounds_are_refused_by_name(kind: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns_of_kind(kinds()[kind]))
    for field in fields_of(type(pattern)):
        for wrong in (None, "middle", 1.5, -1 if field.least is None else field.least - 1, True):
            if wrong is True and field.type is bool:
                continue
            words = rf"^{type(pattern).__name__}\.{field.name}: expected {field.expected}, "
            with pytest.raises(ValueError, match=words):
                dataclasses.replace(pattern, **{field.name: wrong})


@pytest.mark.parametrize("field", ["phase", "sink", "local"])
def test_a_size_fits_the_index_tables(field: str) -> None:
    """Larger ones would fail inside planning."""
    pattern = Grid("frame", True, True, True, 0, 1, 1)
    assert dataclasses.replace(pattern, **{field: LARGEST}) != pattern
    with pytest.raises(ValueError, match=rf"^Grid\.{field}: expected an integer <= 2147483647, got 2147483648"):
        dataclasses.replace(pattern, **{field: LARGEST + 1})


def test_fields_say_what_they_may_hold() -> None:
    stride, v, *_, phase, _, local = fields_of(Grid)
    assert (stride.expected, v.expected) == ('"frame" or "row"', "true or false")
    assert (phase.expected, local.expected) == ("an integer >= 0", "an integer >= 1")
    *_, alpha, _ = fields_of(Adaptive)
    assert alpha.expected == "a number above 0 and at most 1"
    assert [alpha.allows(value) for value in (0, 1e-9, 1, 1.0, 1.01, float("nan"))] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


# ---- what follows from the class ---------------------------------------------------------------------------


@every_kind
@settings(max_examples=10)
@given(data=st.data())
def test_every_pattern_has_a_label_and_a_colour(kind: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns_of_kind(kinds()[kind]))
    assert pattern.label and "\n" not in pattern.label
    assert len(pattern.colour) == 7 and int(pattern.colour[1:], 16) >= 0


def test_no_two_kinds_share_a_colour() -> None:
    colours = [cls.colour for cls in (*kinds().values(), QBoundary, Boundary2D)]
    assert len(set(colours)) == len(colours)


def test_a_label_is_made_where_a_class_has_none() -> None:
    class Plain(Grid):
        label = Pattern.label

    assert Plain("row", True, False, True, 2, 8, 64).label == "grid row,True,False,True,2,8,64"


@every_kind
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: f"{prompt.tokens}-{len(prompt.strides)}")
def test_a_ladder_has_its_own_patterns_under_names_of_their_own(kind: str, prompt: Prompt) -> None:
    rungs = list(kinds()[kind].ladder(prompt))
    assert all(type(pattern) is kinds()[kind] for _, pattern in rungs)
    assert len({name for name, _ in rungs}) == len({pattern for _, pattern in rungs}) or kind == "grid"
    other_head = dataclasses.replace(prompt, phases={})
    assert [name for name, _ in kinds()[kind].ladder(other_head)] == [name for name, _ in rungs]


def test_names_of_all_ladders_differ() -> None:
    everything = (*kinds().values(), Boundary2D)
    names = [name for cls in everything for name, _ in cls.ladder(PROMPTS[-1])]
    assert len(set(names)) == len(names) and names[0] == "dense"


def test_the_table_has_a_row_for_each() -> None:
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(kinds())
    assert rows[1] == (
        "| `a_shape` | `sink` (>= 0), `local` (>= 1) | The first `sink` tokens and the last `local` ones "
        "(q - k < local). |"
    )
    assert all(row.count("|") == 4 and row.split("|")[3].strip() for row in rows)


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_whole_rows_have_reasons_that_the_class_names(kind: str, data: st.DataObject) -> None:
    """And see every key of the class by the exact rule, too, unless they stand behind a medium that has no raster."""
    cls, chat = kinds()[kind], data.draw(maps())
    scope = Scope(
        chat,
        chat.length,
        rows=data.draw(st.sampled_from([None, TEXT, VISION])),
        keys=data.draw(st.sampled_from([None, TEXT, VISION])),
        text_rule=data.draw(st.booleans()),
    )
    pattern, everyone = data.draw(patterns_of_kind(cls)), torch.ones(chat.length, dtype=torch.bool)
    index = pattern.index(scope)
    assert set(index.whole) <= set(cls.reasons)
    rows, keys = (everyone if m is None else chat.members(m) for m in (scope.rows, scope.keys))
    for reason, runs in index.whole.items():
        its_rows = runs.clip(0, chat.length).members()
        assert index.whole_rows is not None and index.whole_rows.has(its_rows).all()
        if reason != grid.NO_RASTER:
            q, k = torch.zeros(2, chat.length, 4)
            pair = Pair(chat, 0, chat.length, chat.length, rows, keys, scope.text_rule, q, k)
            its_rows = torch.from_numpy(its_rows)[rows[its_rows]]
            assert pattern.visible(pair)[its_rows][:, keys].all()


# ---- two accounts of one pattern ---------------------------------------------------------------------------

FOLDER = Path(sys.modules["sglang_mminfer.patterns.base"].__file__ or "").parent
OF_PLANNING = ("sglang_mminfer.patterns.index", "sglang_mminfer.kernels", "sglang_mminfer.modality.runs")
OF_PLANNING += ("sglang_mminfer.modality.segment_table", "sglang_mminfer.planning", "numpy")


def shared_with_planning(source: str) -> list[str]:
    """What `visible`, and whatever of its file it calls, uses of what `index` uses."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    foreign = {"index"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OF_PLANNING):
            foreign.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            foreign.update((a.asname or a.name) for a in node.names if a.name.startswith(OF_PLANNING))
    seen: set[str] = set()
    to_read, used = ["visible"], []
    while to_read:
        name = to_read.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(functions[name]):
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if word in foreign:
                used.append(f"{name}: {word}")
            if word in functions:
                to_read.append(word)
    return used


@every_kind
def test_the_exact_rule_uses_nothing_of_the_index(kind: str) -> None:
    assert shared_with_planning((FOLDER / f"{kind}.py").read_text()) == []


@pytest.mark.parametrize("file", ["pair.py", "mask.py"])
def test_what_exact_rules_are_told_comes_from_the_map_alone(file: str) -> None:
    tree = ast.parse((FOLDER / file).read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module.startswith(OF_PLANNING)]
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not words & {"index", "runs", "on_phase", "table"}


@pytest.mark.parametrize(
    ("body", "used"),
    [
        ("return self.index(pair)", ["visible: index", "index: Runs"]),
        ("return self._helper(pair)", ["_helper: Runs"]),
        ("return pair.window(1, 2)", []),
    ],
)
def test_a_shared_account_is_seen(body: str, used: list[str]) -> None:
    source = f"""
from sglang_mminfer.modality.runs import Runs
class P:
    def visible(self, pair):
        {body}
    def index(self, scope): return Runs.span(0, 1)
    def _helper(self, pair): return Runs.span(0, 1)
"""
    assert shared_with_planning(source) == used


def test_whole_rows_without_a_reason_are_none() -> None:
    assert PairIndex(sink=3).whole_rows is None
    scope = Scope(conversation(4), 4)
    whole = Dense().index(scope).whole_rows
    assert whole is not None and len(whole) == 4


# ---- who may know a pattern by name ------------------------------------------------------------------------


def named_patterns(source: str) -> list[str]:
    """Modules and classes of single patterns that a file imports."""
    own = {f"sglang_mminfer.patterns.{kind}" for kind in kinds()} | {cls.__name__ for cls in kinds().values()}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {node.module, *(alias.name for alias in node.names)}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(name for name in names if name in own)
    return found


def test_planning_knows_no_pattern_by_name() -> None:
    files = sorted((FOLDER.parent / "planning").glob("*.py"))
    assert len(files) > 5 and {file.name: named_patterns(file.read_text()) for file in files} == {
        file.name: [] for file in files
    }
    assert named_patterns("from sglang_mminfer.patterns import grid\n") == ["sglang_mminfer.patterns.grid"]
    assert named_patterns("from sglang_mminfer import Grid\n") == ["Grid"]

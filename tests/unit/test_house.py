"""Who may import whom, held by reading the code: docs/design.md draws the same table."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "sglang_mminfer"

LINES = (
    ("cli", "benchmarks"),
    ("testing",),
    ("tools",),
    ("plugin",),
    ("serving",),
    ("prefill", "head_config"),
    ("planning", "families"),
    ("mends",),
    ("patterns",),
    ("modality",),
    ("kernels",),
    ("settings",),
)
"""From the roof down. A room imports from lines below its own, never sideways."""

LINE_OF = {room: number for number, rooms in enumerate(LINES) for room in rooms}

LIGHT = ("plugin", "settings", "serving.flags", "serving.hooks", "serving.cpu_platform", "families", "mends")
"""Modules that every process of every server imports: Python's own modules alone, before anything is asked of them."""

KNOW_SGLANG = {"serving", "families", "mends", "tools", "benchmarks"}

DOTTED = re.compile(rf"^{PACKAGE}(\.\w+)+")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the product by its name, without the package's."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), ("kernels", "kernels."), ("head_configs", "head_configs.")):
        for path in (root / folder).rglob("*.py"):
            name = prefix + ".".join(path.relative_to(root / folder).with_suffix("").parts)
            found[re.sub(r"\.?__init__$", "", name)] = path
    return found


def imports(path: Path, name: str) -> Iterator[tuple[int, str, bool]]:
    """Line, name and whether at module level, of all that a module imports, by a statement or by a string."""
    tree = ast.parse(path.read_text())
    parts = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    package = parts if path.name == "__init__.py" else parts[:-1]
    only_for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = getattr(node, "col_offset", 1) == 0 and id(node) not in only_for_types
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}", at_top) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := DOTTED.match(node.value)):
            yield node.lineno, found[0], False


def room_of(dotted: str) -> str | None:
    """The room of `sglang_mminfer.room.more`; None for a name of the package itself and for others' modules."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in LINE_OF else None


def upward(root: Path) -> list[str]:
    wrong = []
    for name, path in modules(root).items():
        own = name.split(".")[0]
        if own not in LINE_OF:
            continue
        for line, imported, _ in imports(path, name):
            room = room_of(imported)
            if room is not None and room != own and LINE_OF[room] <= LINE_OF[own]:
                wrong.append(f"{path.relative_to(root)}:{line}: {own} imports {imported}")
    return wrong


def heavy(root: Path) -> list[str]:
    wrong = []
    known = modules(root)
    for name in LIGHT:
        for line, imported, at_top in imports(known[name], name):
            first = imported.split(".")[0]
            light = first in sys.stdlib_module_names or first == PACKAGE
            if at_top and not light:
                wrong.append(f"{known[name].relative_to(root)}:{line}: imports {imported}")
            inner = imported.removeprefix(f"{PACKAGE}.")
            ours = next((inner.rsplit(".", i)[0] for i in range(3) if inner.rsplit(".", i)[0] in known), "")
            if at_top and first == PACKAGE and ours not in (*LIGHT, "", "serving"):
                wrong.append(f"{known[name].relative_to(root)}:{line}: imports {imported}, which is not light")
    return wrong


def own_variables(root: Path) -> list[str]:
    """Names of our variables outside `settings`, where they are more than words of a text."""
    return [
        f"{path.relative_to(root)}:{node.lineno}: {node.value}"
        for name, path in modules(root).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if name != "settings" and isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"SGLANG_MMINFER_\w+", node.value)
    ]


def foreign_dicts(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}"
        for path in modules(root).values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and ast.unparse(node.value) != "self"
    ]


def strangers(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: imports {imported}"
        for name, path in modules(root).items()
        for line, imported, _ in imports(path, name)
        if imported.split(".")[0] == "sglang" and name.split(".")[0] not in KNOW_SGLANG
    ]


RULES = {
    "a room imports from lines below its own": upward,
    "light modules stay light": heavy,
    "only settings reads our variables": own_variables,
    "nobody touches a foreign __dict__": foreign_dicts,
    "sglang is imported where SGLang is met": strangers,
}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_house(rule: str) -> None:
    assert RULES[rule](ROOT) == []


def test_every_room_has_a_line() -> None:
    rooms = {name.split(".")[0] for name in modules(ROOT)} - {"", "head_configs"}
    assert rooms == set(LINE_OF)


BREAKS = {
    "a room imports from lines below its own": ("modality/runs.py", "from sglang_mminfer.planning import tiles\n"),
    "light modules stay light": ("settings.py", "import torch\n"),
    "only settings reads our variables": ("serving/trace.py", 'import os\nos.environ.get("SGLANG_MMINFER_TRACE")\n'),
    "nobody touches a foreign __dict__": ("prefill.py", "def f(plan): plan.__dict__['x'] = 1\n"),
    "sglang is imported where SGLang is met": ("patterns/mask.py", "def f(): import sglang.srt.server_args\n"),
}


@pytest.mark.parametrize("rule", BREAKS, ids=str)
def test_a_broken_rule_is_seen(rule: str, tmp_path: Path) -> None:
    import shutil

    for folder in (PACKAGE, "kernels", "head_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    file, text = BREAKS[rule]
    with (tmp_path / PACKAGE / file).open("a") as out:
        out.write(f"\n{text}")
    assert any(file in said for said in RULES[rule](tmp_path)), rule


@pytest.mark.parametrize(
    "text", ['HIDDEN = "sglang_mminfer.tools.server:Server"\n', "def f(): from sglang_mminfer.tools import server\n"]
)
def test_a_name_in_a_string_or_a_function_is_an_import(text: str, tmp_path: Path) -> None:
    (tmp_path / PACKAGE / "serving").mkdir(parents=True)
    (tmp_path / PACKAGE / "serving" / "x.py").write_text(text)
    assert len(upward(tmp_path)) == 1

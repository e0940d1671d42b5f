"""Who may import whom, held by reading the code: docs/design.md draws the same table."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "sglang_mminfer"

LINES = (
    ("__main__",),
    ("cli", "benchmarks"),
    ("commands",),
    ("testing",),
    ("tools",),
    ("plugin", "frontend"),
    ("serving",),
    ("prefill", "head_config"),
    ("planning", "families"),
    ("mends",),
    ("patterns",),
    ("modality",),
    ("kernels",),
    ("releases", "settings"),
)
"""From the roof down. A room imports from lines below its own, never sideways."""

LINE_OF = {room: number for number, rooms in enumerate(LINES) for room in rooms}

LIGHT = (
    *("plugin", "settings", "releases", "families", "mends"),
    *("serving.flags", "serving.hooks", "serving.cpu_platform"),
)
"""Modules that every process of every server imports: Python's own modules alone, before anything is asked of them."""

KNOW_SGLANG = {"releases", "serving", "families", "mends", "frontend", "tools", "benchmarks"}

DOTTED = re.compile(rf"^{PACKAGE}(\.\w+)+")

OF_SENTENCE = re.compile(r"""(?:^(?:\# |[fr]?\"{3}|[-*] )?|[.:]\s+|\n\s*\n\s*)Of [a-z]""")

PRIVATE = re.compile(r"_(?!_)\w+")

THEIRS_TOO = {
    "_fields": "every named tuple has it, and it is no private name there",
    "_tokenizer": "SGLang's processors have it, where one of ours sets it",
}
"""Private names of ours that others have as well, so that a module may use the others'."""


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


def sources(root: Path) -> list[Path]:
    """Every file of the product, its tests and its examples."""
    folders = (PACKAGE, "kernels", "head_configs", "tests", "examples")
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def own_privates(tree: ast.Module) -> set[str]:
    """The private names that a file gives: of functions, classes, variables and attributes of its objects."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _of_itself(node):
            names.add(node.attr)
    return {name for name in names if PRIVATE.fullmatch(name)}


def used_privates(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of the private names that a file uses: of other objects, in imports, and in strings that are names,
    as monkeypatch and getattr take them. A dotted name in SGLang is SGLang's."""
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        dotted = []
        if isinstance(node, ast.Attribute) and not _of_itself(node):
            dotted = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            dotted = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            dotted = [node.value] if re.fullmatch(r"[\w.:]+", node.value) else []
        for name in dotted:
            if not name.startswith("sglang."):
                yield from ((node.lineno, part) for part in re.split("[.:]", name) if PRIVATE.fullmatch(part))


def _of_itself(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) in ("self", "cls", "super()")


def private_doors(root: Path) -> list[str]:
    """Uses of a private name of ours in another file than those that give it. Names of SGLang's and of libraries are
    not ours, and count only where one of ours has the same."""
    trees = {path: ast.parse(path.read_text()) for path in sources(root)}
    given = {path: own_privates(tree) for path, tree in trees.items()}
    ours = {name for names in given.values() for name in names} - set(THEIRS_TOO)
    return [
        f"{path.relative_to(root)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in used_privates(tree)
        if name in ours - given[path]
    ]


def of_sentences(root: Path) -> list[str]:
    """Sentences of comments, docstrings and documents that begin with "Of": the noun comes first."""
    wrong = []
    for path in sources(root):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            is_prose = token.type == tokenize.COMMENT or token.string.startswith(('"""', 'f"""', 'r"""'))
            if is_prose and OF_SENTENCE.search(token.string):
                wrong.append(f"{path.relative_to(root)}:{token.start[0]}: {token.string[:60]}")
    for path in [*root.glob("docs/*.md"), *root.glob("*.md")]:
        for paragraph in re.split(r"\n\s*\n|\n(?=[-*|#])", path.read_text()):
            if OF_SENTENCE.search(paragraph.strip()):
                wrong.append(f"{path.relative_to(root)}: {paragraph.strip()[:60]}")
    return wrong


RULES = {
    "a room imports from lines below its own": upward,
    "light modules stay light": heavy,
    "only settings reads our variables": own_variables,
    "nobody touches a foreign __dict__": foreign_dicts,
    "sglang is imported where SGLang is met": strangers,
    "nobody enters by a private door": private_doors,
    "no sentence begins with Of": of_sentences,
}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_house(rule: str) -> None:
    assert RULES[rule](ROOT) == []


def test_every_room_has_a_line() -> None:
    rooms = {name.split(".")[0] for name in modules(ROOT)} - {"", "head_configs"}
    assert rooms == set(LINE_OF)


BREAKS = {
    "a room imports from lines below its own": (
        f"{PACKAGE}/modality/runs.py",
        "from sglang_mminfer.planning import tiles\n",
    ),
    "light modules stay light": (f"{PACKAGE}/settings.py", "import torch\n"),
    "only settings reads our variables": (
        f"{PACKAGE}/serving/trace.py",
        'import os\nos.environ.get("SGLANG_MMINFER_TRACE")\n',
    ),
    "nobody touches a foreign __dict__": (f"{PACKAGE}/prefill.py", "def f(plan): plan.__dict__['x'] = 1\n"),
    "sglang is imported where SGLang is met": (
        f"{PACKAGE}/patterns/mask.py",
        "def f(): import sglang.srt.server_args\n",
    ),
    "nobody enters by a private door": ("tests/unit/mends/test_mends.py", "def f(asked): asked._last = None\n"),
    "no sentence begins with Of": (f"{PACKAGE}/patterns/dense.py", "# Rows see keys. Of these all.\n"),
}


@pytest.mark.parametrize("rule", BREAKS, ids=str)
def test_a_broken_rule_is_seen(rule: str, tmp_path: Path) -> None:
    import shutil

    for folder in (PACKAGE, "kernels", "head_configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    file, text = BREAKS[rule]
    with (tmp_path / file).open("a") as out:
        out.write(f"\n{text}")
    assert any(file in said for said in RULES[rule](tmp_path)), rule


def test_every_rule_is_broken_once() -> None:
    assert BREAKS.keys() == RULES.keys()


@pytest.mark.parametrize(
    "text", ['HIDDEN = "sglang_mminfer.tools.server:Server"\n', "def f(): from sglang_mminfer.tools import server\n"]
)
def test_a_name_in_a_string_or_a_function_is_an_import(text: str, tmp_path: Path) -> None:
    (tmp_path / PACKAGE / "serving").mkdir(parents=True)
    (tmp_path / PACKAGE / "serving" / "x.py").write_text(text)
    assert len(upward(tmp_path)) == 1


@pytest.mark.parametrize(
    "text, seen",
    [
        ("from sglang_mminfer.room import _made\n", True),
        ("def f(room): room._made()\n", True),
        ("def f(patch, room): patch.setattr(room, '_made', None)\n", True),
        ("def f(patch): patch.setattr('sglang_mminfer.room._made', None)\n", True),
        ("def f(x): return x._kept\n", True),
        ("def _made(): return _made\n", False),
        ("class Mine:\n    def f(self): return self._kept\n", False),
        ("def f(server): return server._theirs, 'sglang.srt.x._made', f'{server}_made'\n", False),
    ],
)
def test_a_private_door_has_many_handles(text: str, seen: bool, tmp_path: Path) -> None:
    room, test = tmp_path / PACKAGE / "room.py", tmp_path / "tests" / "test_room.py"
    for path, content in (
        (room, "def _made(): ...\nclass X:\n    def __init__(self): self._kept = 1\n"),
        (test, text),
    ):
        path.parent.mkdir()
        path.write_text(content)
    assert bool(private_doors(tmp_path)) == seen


def test_what_is_theirs_too_is_ours_and_used() -> None:
    """An exception that nobody needs is taken out."""
    trees = [ast.parse(path.read_text()) for path in sources(ROOT)]
    for name in THEIRS_TOO:
        assert any(name in own_privates(tree) for tree in trees), name
        assert any(name in {used for _, used in used_privates(tree)} - own_privates(tree) for tree in trees), name

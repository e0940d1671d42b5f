"""The documents hold: links lead somewhere, code runs, and what a page names exists."""

from __future__ import annotations

import contextlib
import email
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from sglang_mminfer import cli, mends, settings
from sglang_mminfer.patterns import __main__ as patterns_page
from sglang_mminfer.serving import launch, reasons

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "head_configs/README.md", ".github/SECURITY.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
)
FOLDERS = ("sglang_mminfer", "kernels", "head_configs", "examples", "tests", "docs")

FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<text>.*?)^```\n", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A block of code. info: what stands behind its fence; "" for an indented one. after: the page behind it."""

    info: str
    text: str
    after: str = ""


def blocks(text: str) -> list[Block]:
    fenced = [Block(match["info"].strip(), match["text"], text[match.end() :]) for match in FENCE.finditer(text)]
    return fenced + [Block("", match[0]) for match in INDENTED.finditer(FENCE.sub("\n", text))]


def prose(text: str) -> str:
    """A page without its blocks."""
    return INDENTED.sub("\n", FENCE.sub("\n", text))


def inline(text: str) -> list[str]:
    """Code within the prose, on one line each."""
    return [" ".join(match[2].split()) for match in INLINE.finditer(prose(text))]


# ---- links --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a `#` may name in a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("\n", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere, other sites apart."""
    wrong = []
    for target in (match["target"] for match in LINK.finditer(prose(page.read_text()))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# A b: `c`\n[x](#a-b-c) [x](a.md#a-b-c) [x](https://x.org) [x](#a) [x](b.md) [x](a.md#b)\n")
    assert broken(page) == ["#a", "b.md", "a.md#b"]


def test_the_readme_leads_to_every_page_in_three_minutes() -> None:
    readme = ROOT / "README.md"
    targets = {match["target"].partition("#")[0] for match in LINK.finditer(readme.read_text())}
    assert {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")} <= targets
    assert len(readme.read_bytes()) <= 7000


@pytest.mark.parametrize("repository", ["", "https://example.org/mminfer"])
def test_no_link_of_the_readme_leads_nowhere_on_a_package_index(repository: str, tmp_path: Path) -> None:
    """The description that a build writes is the README with absolute links, or without them."""
    packages = [f"{folder}/__init__.py" for folder in ("sglang_mminfer", "kernels", "head_configs")]
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py", *packages):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    project = re.sub(r"^\[project\.urls\].*?(?=^\[)", "", (tmp_path / "pyproject.toml").read_text(), flags=re.M | re.S)
    urls = f'[project.urls]\nRepository = "{repository}"\n' if repository else ""
    (tmp_path / "pyproject.toml").write_text(project + urls)
    build = (
        "from setuptools import build_meta as b; import os; os.mkdir('out'); b.prepare_metadata_for_build_wheel('out')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (metadata,) = (tmp_path / "out").glob("*.dist-info/METADATA")
    shown, readme = email.message_from_string(metadata.read_text()).get_payload(), (ROOT / "README.md").read_text()
    here = [match["target"] for match in LINK.finditer(readme)]
    there = [match["target"] for match in LINK.finditer(shown)]
    relative = [target for target in here if ":" not in target]
    assert len(relative) > 20
    if repository:
        assert there == [f"{repository}/blob/main/{target}" if target in relative else target for target in here]
    else:
        assert there == [target for target in here if target not in relative]
    words = [re.sub(r"\[([^\]]*)\]\([^)\s]+\)", r"\1", text).strip() for text in (shown, readme)]
    assert words[0] == words[1]


# ---- code ---------------------------------------------------------------------------------------------------

RUNNABLE = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page.read_text()))
    if block.info == "python"
]


@pytest.mark.parametrize("block", RUNNABLE)
def test_python_blocks_run(block: Block, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if behind := re.match(rf"\s*{FENCE.pattern}", block.after, FENCE.flags):
        assert behind["info"] != "text" or done.stdout == behind["text"]


def test_blocks_are_known() -> None:
    kinds = {block.info for page in PAGES for block in blocks(page.read_text())}
    assert kinds <= {"python", "python no-run", "console", "text", "json", ""}, "see docs/contributing.md"
    assert len(RUNNABLE) >= 4


# ---- commands -----------------------------------------------------------------------------------------------

TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def lines_of(text: str) -> Iterator[list[str]]:
    """The commands of a page's blocks, as a shell would split them, without variables before them."""
    for block in blocks(text):
        if block.info not in ("console", ""):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            with contextlib.suppress(ValueError):  # a drawing, or half of a quotation, and no command
                words = shlex.split(line, comments=True)
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                if words:
                    yield words


@functools.cache
def app() -> Any:
    return typer.main.get_command(cli.app)


def command_of(words: list[str]) -> tuple[Any, list[str]] | None:
    """The command that the words name, which may lie in a group, and its own words; None if there is none."""
    command = app()
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command, words = command.commands.get(words[0]), words[1:]
        if command is None:
            return None
    return command, words


def parses(command: Any, words: list[str]) -> bool:
    """Whether the words can be parsed; whether files are there is not looked at, and nothing is installed."""
    if {"--install-completion", "--show-completion"} & set(words):
        return True
    try:
        command.make_context("mminfer", list(words))
    except typer.BadParameter as error:
        return "no such file" in error.message or "no such folder" in error.message
    except (typer.exceptions.TyperException, typer.Exit) as error:
        return isinstance(error, typer.Exit)
    return True


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def what_is_wrong(words: list[str], complete: bool) -> str | None:
    """Why a command cannot be given so. `complete`: with all that it needs, as a block has it."""
    name, rest = words[0], words[1:]
    if name == "mminfer" and rest:
        if (named := command_of(rest)) is None:
            return "no such command"
        if complete and not parses(*named):
            return "does not parse"
        flags = [word.partition("=")[0] for word in named[1] if word.startswith("--")]
        known = {"--help", *(name for option in named[0].params for name in option.opts)}
        return None if complete or set(flags) <= known else f"no such options: {set(flags) - known}"
    if name == "make":
        wrong = [word for word in rest if "=" not in word and word not in TARGETS]
        return f"no such targets: {wrong}" if wrong else None
    if name.endswith("python") and len(rest) > 1 and rest[0] == "-m":
        return None if has_module(rest[1]) else "no such module"
    if name.endswith("python") and rest and rest[0].endswith(".py"):
        return None if (ROOT / rest[0]).is_file() else "no such file"
    return None


@every_page
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    given = [(words, True) for words in lines_of(text)] + [(code.split(), False) for code in inline(text)]
    wrong = {" ".join(words): why for words, complete in given if (why := what_is_wrong(words, complete))}
    assert wrong == {}


@pytest.mark.parametrize(
    "command, complete",
    [
        ("mminfer dance", False),
        ("mminfer niah --no-such-option", False),
        ("mminfer inspect --rows many", True),
        ("mminfer config chekc", False),
        ("make nothing", True),
        ("python -m sglang_mminfer.nothing", True),
        ("python examples/nothing.py", True),
    ],
)
def test_a_wrong_command_is_seen(command: str, complete: bool) -> None:
    assert what_is_wrong(command.split(), complete)


def test_every_command_and_target_is_told_of() -> None:
    readme, contributing = ((ROOT / name).read_text() for name in ("README.md", "docs/contributing.md"))
    assert {f"mminfer {name}" for name in cli.COMMANDS} <= set(inline(readme))
    told = {word for words in [*map(str.split, inline(contributing)), *lines_of(contributing)] for word in words}
    assert told >= TARGETS - {"ready"}


# ---- names --------------------------------------------------------------------------------------------------


def missing_names(text: str) -> list[str]:
    """Paths, modules, flags and variables that a page names and that do not exist."""
    wrong = []
    for path in re.findall(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w", text):
        if not list(ROOT.glob(path)):
            wrong.append(path)
    rooms = "|".join(path.name for path in (ROOT / "sglang_mminfer").iterdir() if path.is_dir())
    for path in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w/]+\.py", text):
        if not (ROOT / "sglang_mminfer" / path).is_file():
            wrong.append(path)
    for name in re.findall(r"(?<![\w/-])sglang_mminfer(?:\.[A-Za-z_]\w*)+", text):
        module, _, last = name.rpartition(".")
        if not has_module(name) and last not in Path(importlib.util.find_spec(module).origin).read_text():
            wrong.append(name)
    flags = {setting.flag for setting in settings.SETTINGS}
    wrong += [flag for flag in re.findall(r"(?<![\w-])--mminfer-[\w-]+", text) if flag not in flags]
    variables = {setting.variable for setting in settings.SETTINGS}
    wrong += [name for name in re.findall(r"SGLANG_MMINFER_\w+", text) if name not in variables]
    return wrong


@every_page
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing_names(page.read_text()) == []


def test_a_name_that_is_gone_is_seen() -> None:
    text = "kernels/rows_of_old.py serving/old.py sglang_mminfer.serving.Old --mminfer-old SGLANG_MMINFER_OLD docs/*.md"
    assert missing_names(text) == text.split()[:-1]


# ---- pages that are made, or that list what the code lists ------------------------------------------------------


@pytest.mark.parametrize("maker", [settings, mends], ids=lambda maker: maker.__name__)
def test_generated_pages_are_those_of_their_generators(maker) -> None:
    name = maker.__name__.rpartition(".")[2]
    assert (ROOT / "docs" / f"{name}.md").read_text() == maker.page(), f"python -m {maker.__name__} > docs/{name}.md"


def test_the_table_of_patterns_is_made_of_their_classes() -> None:
    page = (ROOT / "docs" / "head-configs.md").read_text()
    assert page == patterns_page.written(page), "python -m sglang_mminfer.patterns docs/head-configs.md"


def first_cells(text: str, heading: str) -> set[str]:
    """The code in the first cells of the tables under a heading."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.sub(r"^\|.*\n(?=\|-)", "", section, flags=re.MULTILINE).splitlines()
    cells = (row.split("|")[1] for row in rows if row.startswith("|"))
    return {match[2] for cell in cells for match in INLINE.finditer(cell)}


def test_operating_has_every_reason_and_every_refusal() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    assert first_cells(text, "Why a request runs dense") == set(reasons.REASONS)
    assert first_cells(text, "What is refused at start-up") == {refusal.name for refusal in launch.REFUSALS}


def test_operating_has_every_key_of_a_trace() -> None:
    from sglang_mminfer.serving.trace import PrefillRecord

    text = (ROOT / "docs" / "operating.md").read_text()
    assert set(PrefillRecord.__struct_fields__) <= first_cells(text, "Trace and metrics")


def test_design_draws_the_rooms() -> None:
    spec = importlib.util.spec_from_file_location("house", Path(__file__).with_name("test_house.py"))
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    text = (ROOT / "docs" / "design.md").read_text()
    drawn = text.partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0].split("\n")
    assert tuple(tuple(line.strip().split(" | ")) for line in drawn if line.strip()) == house.LINES
    described = first_cells(text, "7. Layout")
    assert described == {room for rooms in house.LINES for room in rooms}


def test_every_way_to_serve_has_its_test_or_says_that_nobody_ran_it() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    table = page.split("## Ways to serve")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    assert len(rows) > 20
    for feature, what, by in rows[1:]:
        assert what, feature
        room, tests = "", re.findall(r"`((?:\w+/)*)(test_\w+\.py)`", by)
        assert tests or "read" in by, feature
        for folder, name in tests:
            room = folder or room
            assert (ROOT / "tests" / room / name).is_file(), f"{feature}: {room}{name}"

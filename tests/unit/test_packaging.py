"""What a user gets who installs the package, and not the checkout. tests/packaging/ installs it and starts a server."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sglang_mminfer
import wheels
from sglang_mminfer import cli

ROOT = wheels.ROOT
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

DISTRIBUTIONS = {"PIL": "pillow"}
"""The distributions of modules with another name; the others are, but for _ in place of -."""

FROM_SGLANG = {"flashinfer", "flash_attn", "flash_attn_interface", "cutlass", "quack", "torchcodec"}
"""Imported only where SGLang brought them."""

SERVE = {
    *("settings", "kernels", "modality", "patterns", "planning", "families", "mends"),
    *("prefill", "head_config", "serving", "plugin", "frontend", "cli", "__init__"),
}
"""Rooms whose imports a serving process has, or a frontend program. Those of the others come with the extra [tools]."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("wheel"))


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported(folders: list[Path]) -> dict[str, Path]:
    """Distributions, and a file that imports each."""
    found = {}
    for path in [path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for top in {module.partition(".")[0] for module in modules} - FROM_SGLANG:
                if top not in sys.stdlib_module_names and top != "sglang_mminfer":
                    found[canonicalize_name(DISTRIBUTIONS.get(top, top))] = path
    return found


def test_all_of_the_product_and_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    expected = {"sglang_mminfer/py.typed"}
    for folder, home in (("sglang_mminfer", ""), ("kernels", "sglang_mminfer/"), ("head_configs", "sglang_mminfer/")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{home}{path.relative_to(ROOT)}")
    expected |= {f"sglang_mminfer/head_configs/{path.name}" for path in (ROOT / "head_configs").glob("*.json")}
    files = {name for name in wheels.files_of(wheel) if ".dist-info/" not in name}
    assert files == expected
    assert not [name for name in files if "test_" in name or "/results/" in name or name.startswith("tests")]
    assert "sglang_mminfer/head_configs/default.json" in files and "sglang_mminfer/kernels/triton/launch.py" in files


def test_one_version(wheel: Path) -> None:
    assert wheels.metadata_of(wheel)["Version"] == sglang_mminfer.__version__
    assert PROJECT["dynamic"] == ["version", "readme"] and "version" not in PROJECT


def test_what_a_page_of_a_package_index_shows(wheel: Path) -> None:
    described = wheels.metadata_of(wheel)
    assert described["License-Expression"] == "Apache-2.0" and described.get_all("License-File") == ["LICENSE"]
    assert described["Keywords"] and described.get_all("Classifier") and described.get_all("Project-URL")
    assert set(described.get_all("Provides-Extra", [])) == {"tools", "chat", "dev", "wide"}


def test_whoever_serves_declares_what_is_imported() -> None:
    rooms = [ROOT / "kernels", *(p for p in (ROOT / "sglang_mminfer").iterdir() if p.stem in SERVE)]
    found = imported(rooms)
    declared = names_of(PROJECT["dependencies"])
    undeclared = {name: str(path) for name, path in found.items() if name not in declared}
    assert not undeclared
    assert declared - set(found) == {"decord"}  # which SGLang imports, where serving.ffmpeg has it do so


def test_commands_declare_what_they_import() -> None:
    demo = ROOT / "examples" / "demo"
    own = {path.stem for path in demo.glob("*.py")}
    found = {name: path for name, path in imported([ROOT / "sglang_mminfer", demo]).items() if name not in own}
    extras = PROJECT["optional-dependencies"]
    tools = names_of(extras["tools"])
    chat = names_of(extras["chat"]) - {"sglang-mminfer"}
    undeclared = set(found) - names_of(PROJECT["dependencies"]) - tools - chat
    assert undeclared == {"av", "lmms-eval"}, "the oracle's, which is for tests, and what runs inside lmms-eval"
    assert not (tools | chat) - set(found)
    assert all("chat" in found[name].parts for name in chat)
    assert "sglang-mminfer[tools]" in extras["chat"] and "sglang-mminfer[chat]" in extras["dev"]
    assert undeclared - {"lmms-eval"} <= names_of(extras["dev"])


def test_the_command_line_knows_what_the_extra_brings() -> None:
    tools = names_of(PROJECT["optional-dependencies"]["tools"])
    assert {canonicalize_name(module) for module in cli.TOOLS} == tools


@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if command not in cli.WITHOUT_TOOLS])
def test_a_command_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, and not after an hour, when it is about to draw."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main([command]) == 1
    assert capsys.readouterr().err == (
        f"mminfer {command}: error: needs matplotlib, rich, not installed here: pip install 'sglang-mminfer[tools]'\n"
    )


def test_the_command_line_itself_needs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in cli.TOOLS:
        monkeypatch.setitem(sys.modules, module, None)
    for words in (["--help"], ["--version"], *([command, "--help"] for command in cli.COMMANDS)):
        assert cli.main(words) == 0
    assert "--trust-remote-code" in capsys.readouterr().out


def test_the_doctor_needs_nothing_of_what_it_examines() -> None:
    """Not even its command line: it must run where torch, say, is broken."""
    program = (
        "import sys\nfrom sglang_mminfer import cli\n"
        "cli.main(['doctor', '--help'])\n"
        "print([m for m in ('torch', 'numpy', 'sglang', 'triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

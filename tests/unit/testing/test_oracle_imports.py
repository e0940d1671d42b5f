"""The oracles share no code with what they are held against: neither SGLang's nor this plugin's."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import families

HERE = "sglang_mminfer.testing"
ORACLES = [
    f"{HERE}.oracle",
    *(f"families.{file.stem}" for file in sorted(Path(families.__file__).parent.glob("[!_]*.py"))),
]
"""And what they import from this package, in turn."""

ALLOWED = {"numpy", "torch", "torchvision", "transformers", "tokenizers", "safetensors", "PIL", "av"}
"""Beside the standard library."""


def imported(module: str) -> set[str]:
    """Every module that the source of `module` names in an import statement, wherever it stands."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module}: line {node.lineno}: a relative import"
            # `from package import module` names a module, too.
            ours = node.module.partition(".")[0] in ("sglang_mminfer", "families")
            inside = {f"{node.module}.{alias.name}" for alias in node.names if ours}
            names |= {name for name in inside if _is_module(name)} or {node.module}
    return names


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name.rpartition(".")[0]).submodule_search_locations is not None and (
        importlib.util.find_spec(name) is not None
    )


def test_an_oracle_imports_nothing_of_what_it_judges() -> None:
    seen: set[str] = set()
    waiting = list(ORACLES)
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for name in imported(module):
            root = name.partition(".")[0]
            if root in ("sglang_mminfer", "families"):
                assert root == "families" or name.startswith(HERE), f"{module} imports {name}"
                if name not in seen:
                    waiting.append(name)
            else:
                assert root in ALLOWED or root in sys.stdlib_module_names, f"{module} imports {name}"
    assert {f"{HERE}.oracle_media", f"{HERE}.mrope", f"{HERE}.qwen_video"} <= seen


ANSWER = """
import sys
from families import qwen2_5_vl
from sglang_mminfer.tools.media import make_image, make_video

parts = [
    {"type": "video_url", "video_url": {"url": str(make_video("a.mp4", 8, 56, 56, 4))}},
    {"type": "image_url", "image_url": {"url": str(make_image("a.png", 56, 56))}},
]
oracle = qwen2_5_vl.QWEN2_5_VL.make_oracle(qwen2_5_vl.make("model"))
assert len(oracle.answer([{"role": "user", "content": parts}], 1).token_ids) == 1
strangers = {"sglang", "decord", "torchcodec"} & {name.partition(".")[0] for name in sys.modules}
assert not strangers, strangers
"""


@pytest.mark.timeout(300)
def test_an_answer_loads_no_module_of_sglang(tmp_path: Path) -> None:
    """Not even by another way than an import statement."""
    tests = str(Path(families.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

"""When hooks are installed: those of every server, those that come when a process learns that it works for mminfer or
on our CPU platform, and those that wait for the import of their module. Each test looks into fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from sglang_mminfer import plugin

ON_FUNCTIONS = [
    place
    for hook in plugin.HOOKS
    if hook.kind in ("before", "after", "around")
    for place in hook.at_each_place()
    if place.target_exists()
]
"""Where they are in this release of SGLang."""

LOAD = {hook.target for hook in ON_FUNCTIONS if "load" in hook.when}
MMINFER = {hook.target for hook in ON_FUNCTIONS if "mminfer" in hook.when}
CPU = {hook.target for hook in ON_FUNCTIONS if "cpu" in hook.when}

PROGRAM = """
import importlib, json, pkgutil, sys, types
from sglang_mminfer import plugin

def places():
    functions = [hook for hook in plugin.HOOKS if hook.kind in ("before", "after", "around")]
    return [place for hook in functions for place in hook.at_each_place()]

def hooked():
    found = []
    for hook in places():
        if hook.module in sys.modules and hook.target_exists():
            code = getattr(pkgutil.resolve_name(hook.target), "__code__", None)
            if code is not None and code.co_filename.endswith("hook_registry.py"):
                found.append(hook.target)
    return found

def show():
    print("SHOW " + json.dumps(hooked()), flush=True)

def arguments(backend):
    # As a child process gets them from its parent: resolved.
    from sglang.srt.server_args import ServerArgs
    made = ServerArgs(model_path="model", attention_backend=backend)
    made._resolution_finished = True
    return made
"""

IMPORT_ALL = """
for hook in places():
    if hook.target_exists():
        importlib.import_module(hook.module)
"""


def run(program: str) -> list[Any]:
    """What a fresh process shows."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "SGLANG_PLATFORM"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SHOW ")]


@pytest.fixture(scope="module")
def where_all_is_imported() -> list[Any]:
    """As in a process that starts servers: one without mminfer first, then one with it, then one on the CPU."""
    return run(
        IMPORT_ALL
        + """
from sglang.srt.plugins import load_plugins
from sglang.srt.utils.hf_transformers import processor
by_name = sys.modules["by_name"] = types.ModuleType("by_name")
by_name.f = processor.get_processor

load_plugins()
show()
arguments("triton").resolve_once()
show()
arguments("mminfer").resolve_once()
show()
print("SHOW " + json.dumps([by_name.f is processor.get_processor, by_name.f.__wrapped__ is not by_name.f]))
arguments("mminfer").resolve_once()
from sglang_mminfer.serving import cpu_platform
cpu_platform.use()
show()
depth, function = 0, processor.get_processor
while function.__code__.co_filename.endswith("hook_registry.py"):
    depth, function = depth + 1, function.__wrapped__
print("SHOW " + json.dumps(depth))
"""
    )


def test_a_server_without_mminfer_has_the_few_that_know_who_asks(where_all_is_imported: list[Any]) -> None:
    loaded, stock = where_all_is_imported[:2]
    assert set(loaded) == set(stock) == LOAD
    assert len(LOAD) <= 3  # SGLang searches all its modules for each


def test_a_server_with_mminfer_has_all(where_all_is_imported: list[Any]) -> None:
    assert set(where_all_is_imported[2]) == LOAD | MMINFER


def test_functions_that_were_imported_by_name_are_hooked(where_all_is_imported: list[Any]) -> None:
    assert where_all_is_imported[3] == [True, True]


def test_our_platform_brings_its_own(where_all_is_imported: list[Any]) -> None:
    assert set(where_all_is_imported[4]) == LOAD | MMINFER | CPU == {hook.target for hook in ON_FUNCTIONS}


def test_a_hook_is_installed_once(where_all_is_imported: list[Any]) -> None:
    assert where_all_is_imported[5] == 1


def test_modules_are_not_imported_for_their_hooks() -> None:
    """As in the detokenizer of a server with mminfer."""
    before, after, imported = run(
        """
import sglang.srt.managers.detokenizer_manager
from sglang.srt.plugins import load_plugins
load_plugins()
absent = {hook.module for hook in plugin.HOOKS} - set(sys.modules)
assert "sglang.srt.managers.scheduler" in absent
show()
arguments("mminfer").resolve_once()
assert not absent & set(sys.modules)
show()
"""
        + IMPORT_ALL
        + "show()\n"
    )
    assert set(before) == LOAD
    assert set(after) > LOAD
    assert set(imported) == LOAD | MMINFER

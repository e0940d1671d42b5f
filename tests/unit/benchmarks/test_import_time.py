"""A process of SGLang that needs nothing of this package pays next to nothing for it being installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_mminfer
from sglang_mminfer.benchmarks import import_time

NEW = """
import json, sys
{before}
before = set(sys.modules)
{load}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported_by(load: str, before: str = "") -> list[str]:
    """The modules that a fresh process has after `load` and not before."""
    program = NEW.format(load=load, before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_entry_point_imports_itself_and_the_settings() -> None:
    new = imported_by("import sglang_mminfer.plugin")
    ours = {name.removeprefix("sglang_mminfer.") for name in new if name.split(".")[0] == "sglang_mminfer"}
    assert ours == {
        "sglang_mminfer",
        "plugin",
        "settings",
        "releases",
        "serving",
        "serving.hooks",
        "serving.cpu_platform",
    }
    others = {name.split(".")[0] for name in new} - {"sglang_mminfer"}
    assert others <= set(sys.stdlib_module_names), "nothing that is not Python's own"


def test_registering_imports_nothing_that_only_mminfer_needs() -> None:
    """Every process of every server registers, those that run without mminfer as well."""
    new = imported_by("sglang_mminfer.plugin.register()", before="import sglang_mminfer.plugin")
    ours = [name.removeprefix("sglang_mminfer.") for name in new if name.startswith("sglang_mminfer.")]
    assert "serving.launch" in ours, "hooks of other files were installed"
    assert {name.partition(".")[0] for name in ours} == {"serving", "mends"}
    assert not {"serving.backend", "serving.self_check", "serving.trace", "serving.encoder_watch"} & set(ours), ours


def test_the_measurement() -> None:
    """It measures the very files that are imported here: a fresh process each time, the first round left out."""
    root = Path(sglang_mminfer.__file__).parents[1]
    found = import_time.medians({"one": root, "other": root}, import_time.IMPORT, runs=3)
    assert set(found) == {"one", "other"}
    assert all(0 < processor < 2000 and clock > 0 for processor, clock in found.values())
    with pytest.raises(subprocess.CalledProcessError):
        import_time.milliseconds(root / "absent", "import sglang_mminfer_that_is_not_there")

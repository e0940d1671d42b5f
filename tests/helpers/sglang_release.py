"""An environment with another release of SGLang, over that of the checkout: `make test-sglang` runs tests in it.

    python tests/helpers/sglang_release.py VERSION FOLDER

The folder becomes a virtual environment that finds everything in the environment of this Python, and before that what
lies in itself: the release, and what the release pins to another version than is installed here. Two kinds of pins are
left as they are installed: libraries of GPU kernels, because no test on a CPU calls them, and torch with what is built
for one torch only. So it takes seconds and 200 MB; an environment of the release alone takes minutes and 11 GB.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

LEFT = (
    *("apache-tvm-ffi", "cuda", "flash", "humming", "kernels", "mooncake", "nvidia", "quack", "sgl-", "sglang-kernel"),
    *("tokenspeed", "torch"),
)
"""How the names of packages begin that are left as they are installed."""


def site_packages(folder: Path) -> Path:
    """Where an environment of this Python's version keeps its packages."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))


def other_pins(required: list[str]) -> Iterator[str]:
    """What of a release's requirements is pinned to another version than the installed one, as pip wants it."""
    for requirement in map(Requirement, required):
        name = requirement.name.replace("_", "-").lower()
        pinned = any(clause.operator == "==" for clause in requirement.specifier)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not pinned or name.startswith(LEFT):
            continue
        if not requirement.specifier.contains(metadata.version(name)):
            yield f"{name}{requirement.specifier}"


def build(version: str, folder: Path) -> Path:
    """Make the environment. Returns its Python.

    Raises:
        subprocess.CalledProcessError: if pip cannot install something; it has said why.
    """
    venv.create(folder, clear=True, with_pip=False)
    python, packages = folder / "bin" / "python", site_packages(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--no-deps", f"sglang=={version}"], check=True)
    beneath = sysconfig.get_path("purelib")
    # addsitedir, and not the path alone: what lies beneath has files of paths, too, those of editable installs.
    (packages / "beneath.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")
    (release,) = metadata.distributions(name="sglang", path=[str(packages)])
    if pins := list(other_pins(release.requires or [])):
        print(f"SGLang {version} with {', '.join(pins)}; else as installed in {beneath}", flush=True)
        subprocess.run([*pip, "--no-deps", *pins], check=True)
    return python


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2]).absolute()))

"""The wheel of the checkout, and environments that have it installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "sglang_mminfer", "kernels", "head_configs")

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
"""What `python -m build` and `pip wheel .` do, but with the setuptools that is installed, so without the network."""


def build(folder: Path) -> Path:
    """The wheel, made from a source distribution as `python -m build` makes it, of a copy without what earlier builds
    left behind."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    packed = _built("sdist", source, folder)
    with tarfile.open(packed) as tar:
        tar.extractall(folder)  # of our own making; Python 3.11.2 knows no filter
    return _built("wheel", folder / packed.name.removesuffix(".tar.gz"), folder)


def _built(kind: str, source: Path, into: Path) -> Path:
    # -P: the folder `kernels` must not hide the distribution of that name, which brings a plugin for setuptools.
    done = subprocess.run(
        [sys.executable, "-P", "-c", BUILD.format(kind=kind), str(into)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return into / done.stdout.splitlines()[-1]


def files_of(wheel: Path) -> list[str]:
    """The files in a wheel."""
    return zipfile.ZipFile(wheel).namelist()


def metadata_of(wheel: Path) -> Message:
    """A wheel's METADATA, a message with headers."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(archive.read(name).decode())


def install(wheel: Path, folder: Path, *, fresh: bool = False) -> Path:
    """The Python of a new virtual environment that has the wheel without its extras.

    Args:
        fresh: whether pip installs all that the wheel requires, which takes minutes and 11 GB. Else the environment
            has links to the installed distributions that the wheel requires, directly or not, and to no others.
    """
    # Without pip, which would bring a setuptools or a wheel of its own.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    if not fresh:
        (site,) = folder.glob("lib/python*/site-packages")
        _link(_required(metadata_of(wheel).get_all("Requires-Dist", [])), site)
    offline = () if fresh else ("--no-deps", "--no-index")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *offline, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def environment(**variables: str) -> dict[str, str]:
    """For processes of such an environment: nothing leads back to the checkout."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SGLANG_PLATFORM")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**kept, "PYTHONSAFEPATH": "1", **variables}


def _required(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that these requirements lead to, without any extra of ours, by their names."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), frozenset[str]()) for text in requirements]
    while waiting:
        requirement, asked = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        marker = requirement.marker
        if (name, extras) in seen or (marker and not any(marker.evaluate({"extra": e}) for e in ("", *asked))):
            continue
        seen.add((name, extras))
        try:
            found[name] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        waiting += [(Requirement(text), extras) for text in found[name].requires or ()]
    return found


def _link(distributions: dict[str, metadata.Distribution], site: Path) -> None:
    """Links to all that these distributions put into the site-packages where they are installed."""
    for distribution in distributions.values():
        record = distribution.read_text("RECORD") or ""
        for name in {line.split(",")[0].split("/")[0] for line in record.splitlines()}:
            link = site / name
            if name not in ("", "..", "__pycache__") and not link.exists():
                link.symlink_to(str(distribution.locate_file(name)))

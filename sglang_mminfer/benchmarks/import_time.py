"""What the plugin costs a process of SGLang that does not need it.

    python -m sglang_mminfer.benchmarks.import_time [--before REVISION]... [--runs 15] [--out FILE.json]

Each figure is processor time, followed by wall-clock time. On a busy machine only processor time can be compared.

`import` is the time of `import sglang_mminfer.plugin` in a fresh interpreter. `load` is the time of SGLang's
`load_plugins()`, which every SGLang process calls: SGLang finds the entry points, calls `register()`, and searches
all modules for each hook. It is measured in a process that has imported the detokenizer, which needs no plugin.
`load, with mminfer` goes on until this process has the arguments of a server with mminfer, which installs more hooks.

Each figure is the median of several processes. With --before, processes with the files of those git revisions take
turns with those of the current one; for the loads, processes without this plugin take turns as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from statistics import median

from sglang_mminfer.tools import machine

IMPORT = """
import time
start, clock = time.process_time(), time.perf_counter()
import sglang_mminfer.plugin
print(time.process_time() - start, time.perf_counter() - clock)
"""

LOAD = """
import time
import sglang.srt.managers.detokenizer_manager
from sglang.srt.plugins import load_plugins
start, clock = time.process_time(), time.perf_counter()
load_plugins()
print(time.process_time() - start, time.perf_counter() - clock)
"""

LOAD_WITH_MMINFER = """
import time
import sglang.srt.managers.detokenizer_manager
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
server_args = ServerArgs(model_path="model", attention_backend="mminfer")
server_args._resolution_finished = True  # as a child process gets them
start, clock = time.process_time(), time.perf_counter()
load_plugins()
server_args.resolve_once()
print(time.process_time() - start, time.perf_counter() - clock)
"""


def milliseconds(root: Path | None, program: str) -> tuple[float, float]:
    """Processor time and wall-clock time of `program` in one fresh process, in ms.

    Args:
        root: the folder that holds sglang_mminfer; None runs without the plugin.
        program: Python source that prints both times in seconds.
    """
    # SGLANG_PLUGINS is SGLang's list of the plugins to load.
    path_settings = {"SGLANG_PLUGINS": "none"} if root is None else {"PYTHONPATH": str(root)}
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **path_settings}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    processor, clock = finished.stdout.splitlines()[-1].split()
    return 1e3 * float(processor), 1e3 * float(clock)


def medians(roots: Mapping[str, Path | None], program: str, runs: int) -> dict[str, tuple[float, float]]:
    """`milliseconds` of each root by its label, medians. The roots take turns; a first round, which fills the caches,
    is not counted."""
    rounds = [{label: milliseconds(root, program) for label, root in roots.items()} for _ in range(runs + 1)]
    return {
        label: (median(times[label][0] for times in rounds[1:]), median(times[label][1] for times in rounds[1:]))
        for label in roots
    }


def unpacked(revision: str, into: Path) -> Path:
    """Write the package of a git revision to `into`, laid out as it is installed, with its own entry points.

    Returns `into`.
    """
    repository = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()
    archive = subprocess.run(
        ["git", "archive", revision, "pyproject.toml", "sglang_mminfer", "kernels", "head_configs"],
        capture_output=True,
        check=True,
        cwd=repository,
    ).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(into)  # of our own making; Python 3.11.2 knows no filter
    for name in ("kernels", "head_configs"):
        (into / name).rename(into / "sglang_mminfer" / name)
    info = into / "sglang_mminfer-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-mminfer\nVersion: 0\n")
    groups = tomllib.loads((into / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = (line for group, points in groups.items() for line in (f"[{group}]", *map(" = ".join, points.items())))
    (info / "entry_points.txt").write_text("\n".join(lines))
    return into


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mminfer.benchmarks.import_time", description="What the plugin adds to a process's start."
    )
    parser.add_argument(
        "--before", metavar="REVISION", action="append", default=[], help="a git revision to compare with; repeatable"
    )
    parser.add_argument("--after", metavar="REVISION", default="HEAD", help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=15, help="processes for import; default: %(default)s")
    parser.add_argument("--load-runs", type=int, default=3, help="for load; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    revisions = {f"before ({rev})": rev for rev in options.before} | {f"after ({options.after})": options.after}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        roots = {label: unpacked(rev, Path(scratch) / str(i)) for i, (label, rev) in enumerate(revisions.items())}
        for name, program, runs, paths in (
            ("import", IMPORT, options.runs, roots),
            ("load", LOAD, options.load_runs, {**roots, "without the plugin": None}),
            ("load, with mminfer", LOAD_WITH_MMINFER, options.load_runs, {**roots, "without the plugin": None}),
        ):
            for label, (processor, clock) in medians(paths, program, runs).items() if runs else ():
                print(f"{name}, {label}: {processor:.2f} ms ({clock:.2f} ms), median of {runs}")
                figures.setdefault(name, {})[label] = {"processor_ms": processor, "clock_ms": clock, "runs": runs}
    if options.out:
        options.out.write_text(json.dumps({**machine.describe(), "figures": figures}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

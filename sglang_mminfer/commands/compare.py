"""The words of `mminfer compare`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from sglang_mminfer import settings
from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import bad

BASELINES = ("a_shape", "tri_shape", "sparse_fixed", "sparse_strided", "swin", "minference", "wrong_phase")
"""The names of `tools.baselines`, which needs torch."""


def _density(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise bad(f"expected a number between 0 and 1, got {value:g}")
    return value


def configs_or_baselines(names: list[str]) -> list[str]:
    """As `options.head_configs`, and names of baselines are taken, too."""
    options.head_configs([name for name in names if name not in BASELINES])
    return names


def compare(
    model_path: options.ModelPath,
    mminfer_config: Annotated[
        list[str],
        typer.Option(
            settings.CONFIG.flag,
            metavar="NAME|PATH...",
            callback=configs_or_baselines,
            help=f"head configs, or baselines: {', '.join(BASELINES)} (default: dense, default and all baselines)",
        ),
    ] = [],
    add: Annotated[
        list[str], typer.Option(metavar="NAME|PATH...", callback=configs_or_baselines, help="further head configs")
    ] = [],
    density: Annotated[
        float | None,
        typer.Option(
            metavar="D", callback=_density, help="0 to 1: of the baselines, for prompts of the greatest length"
        ),
    ] = None,
    server_flags: options.ServerFlags = "--chunked-prefill-size -1",
    tasks: options.Tasks = [],
    lengths: options.Lengths = [4096, 8192],
    depths: options.Depths = 5,
    seeds: options.Seeds = 2,
    seed: options.Seed = 1,
    needles: options.Needles = None,
    no_relays: Annotated[bool, typer.Option("--no-relays", help="plain needles only")] = False,
    concurrency: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="conversations side by side; above 1, prefill times are those of a busy server",
        ),
    ] = 1,
    timeout: options.Timeout = 1800,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for compare.json, .md and .png")] = Path(
        "compare-out"
    ),
    json: options.AsJson = False,
) -> int:
    """One table of head configs and baselines: needles found, density, prefill time.

    Serves a model with one head config after the other (dense, the default, the baselines of the paper's comparison,
    yours) and prints which share of the needles each finds, at which density and prefill time. Resumable. With
    --density the baselines get windows of that density; without it they have their published sizes.
    """
    words = SimpleNamespace(**locals(), relays=not no_relays)
    from sglang_mminfer.tools.compare import run

    return run(words)

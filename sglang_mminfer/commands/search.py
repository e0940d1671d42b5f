"""The words of `mminfer search`."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import typer

from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import Refused, bad
from sglang_mminfer.tools.search import BOUNDARIES


def _share(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise bad(f"expected a density above 0 and at most 1, got {value:g}")
    return value


def _gib(text: str | None) -> int | None:
    """A number of GiB, in bytes."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise bad(f"expected a number of GiB above 0, got {text!r}")
    return int(value * 2**30)


def _boundaries(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BOUNDARIES]:
        raise bad(f"expected some of {','.join(BOUNDARIES)}, got {unknown[0]!r}")
    return tuple(name for name in BOUNDARIES if name in names)


def _repo(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise bad(f"expected OWNER/REPO, got {name}")
    return name


def search(
    model: Annotated[str | None, typer.Argument(hidden=True, callback=options.model)] = None,
    model_path: Annotated[
        str | None,
        typer.Option(metavar="PATH|NAME", callback=options.model, help="a model: its folder, or its hub name"),
    ] = None,
    video: options.Videos = [],
    conversation: options.Conversations = [],
    held_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=options.file,
            help="a video (or .json conversation) that only the report looks at",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="D", callback=_share, help="mean density of all heads, above 0 to 1 (default: 0.25)"),
    ] = None,
    error: Annotated[
        float | None, typer.Option(metavar="E", help="mean error of all heads, in place of a density")
    ] = None,
    boundaries: Annotated[
        str,
        typer.Option(
            metavar="none,q,2d",
            callback=_boundaries,
            help="which a head may have; all are measured, so that with the same --work an ablation measures once",
        ),
    ] = ",".join(BOUNDARIES),
    cost: Annotated[
        Literal["time", "pairs"],
        typer.Option(
            metavar="time|pairs",
            help="what an error is weighed against: what the tile visits take on this machine, or the pairs they hold. "
            "Times are measured once and kept in --work; measured again they may differ a little, and the config too",
        ),
    ] = "time",
    tile_times: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=options.file,
            help="another search's WORK/tile_times.json, to decide as it did",
        ),
    ] = None,
    dense_below: Annotated[int, typer.Option(metavar="N", help="rows below this position see everything")] = 0,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="GIB",
            callback=_gib,
            help="what measuring may take in each rank, beside the server's own (default: a quarter of the machine, "
            "shared by the ranks; of a GPU a twentieth); heads that do not fit are measured one after the other",
        ),
    ] = None,
    server_flags: options.ServerFlags = "",
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="folder for what was measured; makes the search resumable (default: OUT.search)"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the config goes; the report beside it")] = Path(
        "head_config.json"
    ),
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/REPO",
            callback=_repo,
            help="put config, report and a card on the Hugging Face Hub, too; servers then take hf://OWNER/REPO/FILE",
        ),
    ] = None,
    json: options.AsJson = False,
) -> int:
    """Make a head config for a model from calibration videos or conversations.

    Runs candidates of every pattern inside the model's own layers, in a real server, and shares one budget out over all
    heads. Writes the config and a report with pictures beside it.
    """
    words = SimpleNamespace(**locals())
    if (model is None) == (model_path is None):
        raise Refused("name the model with --model-path")
    words.model_path = model_path or model
    if density is not None and error is not None:
        raise Refused("give --density or --error, not both")
    if not video and not conversation:
        raise Refused("expected at least one --video or --conversation to calibrate on")
    from sglang_mminfer.tools.search.command import run

    return run(words)

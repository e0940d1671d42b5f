"""The words of `mminfer basis`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import bad

ENDING = ".basis.npz"


def _out(path: Path) -> Path:
    if not path.name.endswith(ENDING):
        raise bad(f"expected a name that ends in {ENDING}, got {path.name}")
    return path


def basis(
    model_path: options.ModelPath,
    video: options.Videos = [],
    conversation: options.Conversations = [],
    rank: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="dimensions of a form (default: 32, at most the head's)")
    ] = None,
    server_flags: options.ServerFlags = "",
    out: Annotated[
        Path, typer.Option(metavar="FILE", callback=_out, help=f"where the basis goes: NAME{ENDING}")
    ] = Path(f"model{ENDING}"),
    json: options.AsJson = False,
) -> int:
    """Make the low-rank forms by which heads choose keys, from calibration conversations.

    Computes the conversations densely, in a real server, and writes the low-rank forms of q . k by which `adaptive`
    heads choose keys. Without a --video or --conversation it takes the clip that a server sends itself. Put the file
    beside a head config, or name it in SGLANG_MMINFER_BASIS.
    """
    words = SimpleNamespace(**locals())
    from sglang_mminfer.tools.basis.command import run

    return run(words)

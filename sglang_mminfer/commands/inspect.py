"""The words of `mminfer inspect`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from sglang_mminfer import settings
from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import Refused, bad


def _trace(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise bad(
            f"{path}: no such file. A server that was started with {settings.TRACE.variable}=FILE writes its trace, "
            "a line for each chunk that it prefills, to FILE"
        )
    return path


def _heads(texts: list[str]) -> list[tuple[int, int]]:
    heads = []
    for text in texts:
        layer, _, head = text.partition(":")
        if not (layer.isdecimal() and head.isdecimal()):
            raise bad(f"expected LAYER:HEAD, like 0:3, got {text!r}")
        heads.append((int(layer), int(head)))
    return heads


Media = Annotated[
    list[str],
    typer.Option(
        metavar="FILE",
        callback=options.media,
        help="a file or a URL; may be repeated",
        rich_help_panel=options.INPUT,
    ),
]


def inspect(
    model_path: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME",
            callback=options.model,
            help="a model: its folder, or its hub name. A server is started with it",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_trace, help=f"what {settings.TRACE.variable} of a server wrote"),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=options.file,
            help="a conversation: a JSON list of OpenAI messages",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    video: Media = [],
    image: Media = [],
    text: Annotated[
        str, typer.Option(metavar="TEXT", help="the question about them", rich_help_panel=options.INPUT)
    ] = "What do you see?",
    mminfer_config: options.HeadConfigName = "default",
    heads: Annotated[
        list[str],
        typer.Option(metavar="L:H...", callback=_heads, help="layer and head to draw (default: one of each pattern)"),
    ] = [],
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="rows to sample of each head, at most")] = 2048,
    rid: Annotated[str | None, typer.Option(metavar="RID", help="with --trace: one request only")] = None,
    server_flags: options.ServerFlags = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for inspect.html and its pictures")] = Path(
        "inspect-out"
    ),
    json: options.AsJson = False,
) -> int:
    """See what the heads do with a prompt, or what a server's trace tells.

    Draws the modality map, the real attention of heads against the tiles they visit, recall, density and why rows see
    everything: PNG files and one HTML page with everything in it. With --trace, what that has.
    """
    words = SimpleNamespace(**locals())
    if (model_path is None) == (trace is None):
        raise Refused("give a model with --model-path, or a server's trace with --trace; one of the two")
    if trace is None and messages is None and not video and not image:
        raise Refused("nothing to look at: give --video, --image or --messages")
    from sglang_mminfer.tools.inspect.command import run

    return run(words)

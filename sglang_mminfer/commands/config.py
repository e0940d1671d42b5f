"""The words of `mminfer config`."""

from __future__ import annotations

from typing import Annotated

import typer

from sglang_mminfer.commands import options, parsing

app = parsing.new_app(help="Check, show or list head configs; no server and no SGLang is needed.")

Name = Annotated[str, typer.Argument(metavar="NAME|PATH", callback=options.head_config, help="a head config")]


@app.command("check", cls=parsing.Command)
def check(
    config: Name,
    model_path: Annotated[
        str | None,
        typer.Option(metavar="PATH|NAME", callback=options.model, help="check that it fits this model, too"),
    ] = None,
    json: options.AsJson = False,
) -> int:
    """Read a head config as a server would. Exit status 0 if a server would take it, else 1."""
    from sglang_mminfer.tools import configs

    return configs.check(config, model_path, json)


@app.command("show", cls=parsing.Command)
def show(config: Name, json: options.AsJson = False) -> int:
    """Show what the heads of a config do, and where it comes from."""
    from sglang_mminfer.tools import configs

    return configs.show(config, json)


@app.command("list", cls=parsing.Command)
def list_(json: options.AsJson = False) -> int:
    """List the built-in head configs with a line of provenance each."""
    from sglang_mminfer.tools import configs

    return configs.list_built_in(json)

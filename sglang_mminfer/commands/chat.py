"""The words of `mminfer chat`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import Failed, Refused, bad

PAGE = "The page"


def _server_url(url: str | None) -> str | None:
    if url is not None and not options.is_url(url):
        raise bad(f"expected something like http://127.0.0.1:30000, got {url}")
    return url


def chat(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=_server_url,
            help="a running server (default: http://127.0.0.1:30000)",
            rich_help_panel=options.SERVERS,
        ),
    ] = None,
    api_key: options.ApiKey = None,
    model_path: options.ServedModel = None,
    mminfer_config: options.HeadConfigName = None,
    server_flags: options.ServerFlags = "",
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="what the page listens on; other machines get in only with --auth-file",
            rich_help_panel=PAGE,
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="its port", rich_help_panel=PAGE)] = 7860,
    auth_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=options.file,
            help="a line NAME:PASSWORD for each who may log in",
            rich_help_panel=PAGE,
        ),
    ] = None,
    max_upload_mb: Annotated[
        int, typer.Option(metavar="MB", min=1, help="the largest file", rich_help_panel=PAGE)
    ] = 512,
    json: options.AsJson = False,
) -> int:
    """Talk about videos and images in a browser, with what each turn cost.

    Serves a page for a running server, or starts a server with the plugin and --model-path. Under each answer stand
    cached and new tokens, the time to the first token, density, and a strip of the prompt. Ctrl-C ends it.
    """
    if url is not None and model_path is not None:
        raise Refused("name a running server with --url, or a model to serve with --model-path; one of the two")
    if model_path is None and (mminfer_config or server_flags):
        raise Refused("--mminfer-config and --server-flags are for a server that is started: give --model-path, too")
    if importlib.util.find_spec("gradio") is None:
        raise Failed("needs gradio, not installed here: pip install 'sglang-mminfer[chat]'")
    from sglang_mminfer.tools.chat.serve import Options, serve

    given = Options(
        url=url or Options.url,
        model_path=model_path,
        config=mminfer_config or Options.config,
        server_flags=server_flags,
        host=host,
        port=port,
        auth_file=auth_file,
        max_upload_mb=max_upload_mb,
        api_key=api_key,
    )
    return serve(given, as_json=json)

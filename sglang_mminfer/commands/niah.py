"""The words of `mminfer niah`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import Refused, bad


def _urls(urls: list[str]) -> list[str]:
    for url in urls:
        if not options.is_url(url):
            raise bad(f"expected something like http://127.0.0.1:30000, got {url}")
    return urls


def niah(
    url: Annotated[
        list[str],
        typer.Option(
            metavar="URL", callback=_urls, help="a running server; may be repeated", rich_help_panel=options.SERVERS
        ),
    ] = [],
    model: options.NameToAskFor = None,
    api_key: options.ApiKey = None,
    model_path: options.ServedModel = None,
    mminfer_config: options.HeadConfigNames = [],
    server_flags: options.ServerFlags = "",
    inline_media: Annotated[
        bool,
        typer.Option(
            "--inline-media",
            help="send media in the requests, to servers that cannot read files here",
            rich_help_panel=options.SERVERS,
        ),
    ] = False,
    tasks: options.Tasks = [],
    lengths: options.Lengths = [4096, 8192],
    depths: options.Depths = 5,
    seeds: options.Seeds = 2,
    seed: options.Seed = 1,
    needles: options.Needles = None,
    relays: Annotated[
        bool, typer.Option("--relays", help="ask for relays, too: needles that name an earlier one")
    ] = False,
    concurrency: options.Concurrency = 2,
    timeout: options.Timeout = 1800,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for niah.json, niah.png and media")] = Path(
        "niah-out"
    ),
    json: options.AsJson = False,
) -> int:
    """Find needles in long videos and conversations, with any server: a heat map by length and depth.

    Hides needles in long videos (v-niah) and in conversations of text, images and videos over several turns (mm-niah),
    asks for them, and draws which are found, by length and depth. With --url it asks any running OpenAI-compatible
    server; with --model-path it starts SGLang servers with the plugin, one after another for each --mminfer-config. All
    are asked the same and stand side by side in one table, one picture and one JSON file.
    """
    words = SimpleNamespace(**locals())
    if bool(url) == bool(model_path):
        raise Refused("name running servers with --url, or a model to serve with --model-path; one of the two")
    if mminfer_config and not model_path:
        raise Refused("--mminfer-config is for servers that are started: give --model-path, too")
    for name in url:
        options.reachable(name)
    from sglang_mminfer.tools.niah.command import run

    return run(words)

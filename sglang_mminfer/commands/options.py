"""Options that several commands share, each under one name and with one check. Checks read no more than the disk."""

from __future__ import annotations

import json
import re
import shlex
import socket
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from sglang_mminfer import settings
from sglang_mminfer.commands.parsing import Failed, bad

SERVERS = "Servers"
QUESTIONS = "Questions"
INPUT = "Input"

MAX_DEPTHS, SHORTEST = 8, 512
"""Bounds of `tools.needles`, which needs torch."""

# ---- checks ---------------------------------------------------------------------------------------------------

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model(text: str | None) -> str | None:
    """A model's folder, which must be there, or a name that the hub may know.

    Raises:
        typer.BadParameter: neither.
    """
    if text is None:
        return None
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise bad(f"{text}: no model, there is no config.json in this folder")
        return str(folder)
    if folder.exists():
        raise bad(f"{text}: expected the folder of a model, and this is a file")
    if text.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(text):
        raise bad(f"{text}: no such folder")
    return text


def file(path: Path | None) -> Path | None:
    """A file that must be there.

    Raises:
        typer.BadParameter: it is not.
    """
    if path is not None and not path.is_file():
        raise bad(f"{path}: {'this is a folder, expected a file' if path.is_dir() else 'no such file'}")
    return path


def files(paths: list[Path]) -> list[Path]:
    """Files that must be there; errors as `file`."""
    for path in paths:
        file(path)
    return paths


def media(names: list[str]) -> list[str]:
    """URLs, and files that must be there; errors as `file`."""
    for name in names:
        if "://" not in name:
            file(Path(name))
    return names


def head_config(name: str | None) -> str | None:
    """A head config's name, path or place on the hub, as far as that can be told without reading it.

    Raises:
        typer.BadParameter: no such file, or no built-in config of this name.
    """
    if name is None:
        return name
    if "://" in name:
        if not re.fullmatch(settings.HUB_NAME, name):
            raise bad(f"{name}: expected hf://owner/repo[@revision]/path/file.json")
        return name
    if "/" in name or name.endswith(".json"):
        file(Path(name).expanduser())
    elif name not in (known := built_in_configs()):
        raise bad(
            f'head config "{name}": no built-in config has this name; available: {", ".join(known)}. '
            "A path needs a separator or the ending .json."
        )
    return name


def head_configs(names: list[str]) -> list[str]:
    """As `head_config`, for each."""
    for name in names:
        head_config(name)
    return names


def built_in_configs() -> list[str]:
    """Names of the built-in head configs, in order."""
    folder = resources.files("sglang_mminfer.head_configs")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))


def reachable(url: str) -> None:
    """Whether anything listens at a URL of this machine; what lies behind a proxy only a real request can tell.

    Raises:
        Failed: nothing does.
    """
    parts = urlsplit(url)
    if parts.hostname in ("127.0.0.1", "localhost", "::1"):
        try:
            socket.create_connection((parts.hostname, parts.port or 80), timeout=5).close()
        except OSError:
            raise Failed(f"--url {url}: no server there; start one with `sglang serve`") from None


def is_url(text: str) -> bool:
    """Whether a text can be the address of a server."""
    return urlsplit(text).scheme in ("http", "https") and bool(urlsplit(text).hostname)


def words(text: str) -> str:
    """Flags of a server, as a shell would split them.

    Raises:
        typer.BadParameter: a quotation does not end.
    """
    try:
        shlex.split(text)
    except ValueError as error:
        raise bad(f"{text!r}: {error}") from None
    return text


def json_object(text: str) -> dict[str, Any]:
    """Parser of a JSON object.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise bad(f"expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise bad(f"expected a JSON object, got {text!r}")
    return found


# ---- options --------------------------------------------------------------------------------------------------

ModelPath = Annotated[
    str,
    typer.Option("--model-path", metavar="PATH|NAME", callback=model, help="a model: its folder, or its hub name"),
]
"""Without a default it is required."""

ServedModel = Annotated[
    str | None,
    typer.Option(
        "--model-path",
        metavar="PATH|NAME",
        callback=model,
        help="start SGLang with this model: its folder, or its hub name",
        rich_help_panel=SERVERS,
    ),
]
"""For commands that may ask running servers in its place."""

NameToAskFor = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="name to ask those servers for (default: the first that each lists)",
        rich_help_panel=SERVERS,
    ),
]

HeadConfigName = Annotated[
    str | None,
    typer.Option(
        settings.CONFIG.flag,
        metavar="NAME|PATH",
        callback=head_config,
        help="head config, as for the server: a name, a file, hf://...",
    ),
]

HeadConfigNames = Annotated[
    list[str],
    typer.Option(
        settings.CONFIG.flag,
        metavar="NAME|PATH...",
        callback=head_configs,
        help="head configs: a server with each, one after the other",
        rich_help_panel=SERVERS,
    ),
]

ServerFlags = Annotated[
    str,
    typer.Option(
        "--server-flags",
        metavar="'FLAGS'",
        callback=words,
        help="further flags of servers that are started, in quotes: --server-flags '--tp-size 2'",
        rich_help_panel=SERVERS,
    ),
]

ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="OPENAI_API_KEY",
        help="of running servers",
        rich_help_panel=SERVERS,
    ),
]

AsJson = Annotated[
    bool,
    typer.Option("--json", help="print the result as one JSON document; all else goes to standard error"),
]

Videos = Annotated[
    list[Path],
    typer.Option(
        "--video", metavar="FILE", callback=files, help="a calibration video; may be repeated", rich_help_panel=INPUT
    ),
]

Conversations = Annotated[
    list[Path],
    typer.Option(
        "--conversation",
        metavar="FILE",
        callback=files,
        help="a JSON list of OpenAI messages; may be repeated",
        rich_help_panel=INPUT,
    ),
]


class Task(StrEnum):
    """Needle tasks that a user names; relays come with the option of their own."""

    VIDEO = "v-niah"
    MIXED = "mm-niah"


Tasks = Annotated[
    list[Task],
    typer.Option("--tasks", metavar="TASK...", help="v-niah, mm-niah (default: what fits)", rich_help_panel=QUESTIONS),
]
Lengths = Annotated[
    list[int],
    typer.Option(
        "--lengths",
        metavar="TOKENS...",
        min=SHORTEST,
        max=10_000_000,
        help="of the conversations, about",
        rich_help_panel=QUESTIONS,
    ),
]
Depths = Annotated[
    int,
    typer.Option(
        "--depths",
        metavar="N",
        min=2,
        max=MAX_DEPTHS,
        help="needles asked for, from start to end",
        rich_help_panel=QUESTIONS,
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        "--seeds",
        metavar="N",
        min=1,
        max=10_000,
        help="conversations of each task and length",
        rich_help_panel=QUESTIONS,
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="the first of them", rich_help_panel=QUESTIONS)]
Needles = Annotated[
    Literal["cards", "glyphs"] | None,
    typer.Option(
        "--needles",
        metavar="cards|glyphs",
        help="cards: sentences that a real model reads; glyphs: for the needle models of examples/needle_vlm (default: "
        "what the model is)",
        rich_help_panel=QUESTIONS,
    ),
]
Concurrency = Annotated[
    int,
    typer.Option("--concurrency", metavar="N", min=1, help="conversations side by side"),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="S", help="seconds for an answer")]

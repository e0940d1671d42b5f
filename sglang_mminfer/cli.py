"""The command `mminfer`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

Parser = argparse.ArgumentParser


def _doctor(parser: Parser) -> None:
    from sglang_mminfer import settings

    parser.description = (
        "Says what is installed, whether SGLang sees the plugin, what would run for a model, and "
        "how to mend what is wrong. Exit status 0 if all that is needed is fine, else 1."
    )
    parser.add_argument("--model-path", metavar="P", help="a model directory, or its name on the hub")
    parser.add_argument(settings.CONFIG.flag, metavar="NAME|PATH", help="head config, as for the server")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--video", metavar="FILE", help="tokens, frames, grid, memory and density of this video with --model-path"
    )
    parser.add_argument(
        "--mm-process-config", metavar="JSON", type=_json_object, help="of the server, for --video; default: SGLang's"
    )
    parser.add_argument(
        "--chunked-prefill-size",
        metavar="N",
        type=int,
        help="of the server, for --video; default: SGLang's choice here",
    )

    parser.add_argument(
        "--trust-remote-code", action="store_true", help="of the server: run code that comes with the model (NVILA)"
    )

    def run(arguments: argparse.Namespace) -> int:
        from sglang_mminfer.tools.doctor.report import run

        video = None
        if arguments.video is not None:
            if arguments.model_path is None:
                parser.error("--video needs --model-path: tokens and frames differ from model to model")
            from sglang_mminfer.tools.doctor.video import VideoOptions

            video = VideoOptions(arguments.video, arguments.mm_process_config, arguments.chunked_prefill_size)
        return run(
            arguments.model_path,
            arguments.mminfer_config,
            as_json=arguments.json,
            video=video,
            trust_remote_code=arguments.trust_remote_code,
        )

    parser.set_defaults(run=run)


def _json_object(text: str) -> dict[str, Any]:
    """argparse type: a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found


def _search(parser: Parser) -> None:
    from sglang_mminfer.tools.search.command import add_arguments, run

    parser.description = (
        "Runs candidates of every pattern inside the model's own layers, in a real server, and shares one "
        "budget out over all heads. Writes the config and a report with pictures beside it."
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def _niah(parser: Parser) -> None:
    from sglang_mminfer.tools.niah import command as niah_command

    parser.description = niah_command.DESCRIPTION
    niah_command.add_options(parser)
    parser.set_defaults(run=niah_command.run)


def _compare(parser: Parser) -> None:
    from sglang_mminfer.tools import compare

    parser.description = compare.DESCRIPTION
    compare.add_options(parser)
    parser.set_defaults(run=compare.run)


def _basis(parser: Parser) -> None:
    from sglang_mminfer.tools.basis.command import add_arguments, run

    add_arguments(parser)
    parser.set_defaults(run=run)


def _inspect(parser: Parser) -> None:
    from sglang_mminfer.tools.inspect.command import add_arguments, run

    parser.description = (
        "Draws the modality map, the real attention of heads against the tiles they visit, recall, density "
        "and why rows see everything: PNG files and one HTML page with everything in it. With --trace, what that has."
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "doctor": ("check the installation, and what would happen with a model", _doctor),
    "search": ("make a head config for a model from calibration videos or conversations", _search),
    "basis": ("make the low-rank forms by which heads choose keys, from calibration conversations", _basis),
    "niah": ("find needles in long videos and conversations, with any server: a heat map by length and depth", _niah),
    "compare": ("one table of head configs and baselines: needles found, density, prefill time", _compare),
    "inspect": ("see what the heads do with a prompt, or what a server's trace tells", _inspect),
}
"""Each adds its own arguments and the default `run`, which takes the arguments and returns the exit status. Only the
command that was asked for does so: the doctor must run where the others cannot even be imported."""

TOOLS = ("httpx", "imageio_ffmpeg", "jinja2", "matplotlib", "openai", "rich", "safetensors", "scipy", "tokenizers")
"""Modules that the extra [tools] brings. Every command but the doctor uses some of them, and most only late: a search
that has run for an hour must not find out then that it cannot draw."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status."""
    from sglang_mminfer import __version__

    parser = argparse.ArgumentParser(
        prog="mminfer", description="Modality-aware permuted sparse prefill for SGLang: tools."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    words = sys.argv[1:] if arguments is None else arguments
    asked = next((word for word in words if not word.startswith("-")), None)
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if missing and asked in COMMANDS and asked != "doctor":
        print(
            f"mminfer {asked}: needs {', '.join(missing)}, not installed here: pip install 'sglang-mminfer[tools]'",
            file=sys.stderr,
        )
        return 1
    for name, (text, add) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == asked:
            add(command)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    raise SystemExit(main())

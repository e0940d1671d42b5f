"""The command `mminfer`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def _doctor(commands: argparse._SubParsersAction) -> None:
    from sglang_mminfer import config

    parser = commands.add_parser(
        "doctor",
        help="check the installation, and what would happen with a model",
        description="Says what is installed, whether SGLang sees the plugin, what would run for a model, and "
        "how to mend what is wrong. Exit status 0 if all that is needed is fine, else 1.",
    )
    parser.add_argument("--model-path", metavar="P", help="a model directory, or its name on the hub")
    parser.add_argument(config.FLAG, metavar="NAME|PATH", help="head config, as for the server")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")

    def run(arguments: argparse.Namespace) -> int:
        from sglang_mminfer.doctor import run

        return run(arguments.model_path, arguments.mminfer_config, as_json=arguments.json)

    parser.set_defaults(run=run)


def _inspect(commands: argparse._SubParsersAction) -> None:
    from sglang_mminfer.inspect_command import add_arguments, run

    parser = commands.add_parser(
        "inspect",
        help="see what the heads do with a prompt, or what a server's trace tells",
        description="Draws the modality map, the real attention of heads against the tiles they visit, recall, density "
        "and why rows see everything: PNG files and one HTML page with everything in it. With --trace, what that has.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


COMMANDS: tuple[Callable[[argparse._SubParsersAction], None], ...] = (_doctor, _inspect)
"""Each adds its own parser, whose default `run` takes the arguments and returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status."""
    from sglang_mminfer import __version__

    parser = argparse.ArgumentParser(
        prog="mminfer", description="Modality-aware permuted sparse prefill for SGLang: tools."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    raise SystemExit(main())

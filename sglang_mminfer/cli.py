"""The command `mminfer`: a table of commands, whose words `commands` reads and whose work `tools` does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated

import typer

from sglang_mminfer import __version__
from sglang_mminfer.commands import basis, chat, compare, config, doctor, env, eval, inspect, niah, parsing, search
from sglang_mminfer.commands.parsing import EXIT_STATUSES, TOOLS

__all__ = ["COMMANDS", "TOOLS", "app", "main"]

NAME = "mminfer"

COMMANDS: dict[str, Callable[..., int] | typer.Typer] = {
    "doctor": doctor.doctor,
    "search": search.search,
    "basis": basis.basis,
    "niah": niah.niah,
    "compare": compare.compare,
    "eval": eval.evaluate,
    "inspect": inspect.inspect,
    "chat": chat.chat,
    "config": config.app,
    "env": env.env,
}
"""Each command's function: its signature is the command's options, its docstring the help, its result the exit status.
"""

WITHOUT_TOOLS = ("doctor", "config", "env")
"""Commands that run without the extra [tools]: the doctor must run where the others cannot even be imported."""


def _version(asked: bool) -> None:
    if asked:
        parts = [f"{NAME} {__version__}"]
        for name in ("sglang", "torch", "transformers"):
            try:
                parts.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                parts.append(f"{name} (not installed)")
        print(", ".join([*parts, f"Python {sys.version.split()[0]}"]))
        raise typer.Exit


app = parsing.new_app(
    help="Modality-aware permuted sparse prefill for SGLang: tools.",
    epilog="\b\n"
    + "\n".join(
        ["Exit status:"]
        + [f"  {status:<4} {meaning}" for status, meaning in EXIT_STATUSES.items()]
        + ["`mminfer env` tells of the environment variables."]
    ),
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="versions of mminfer, SGLang, torch and Python"
        ),
    ] = False,
) -> None:
    """Options of `mminfer` itself."""


for name, command in COMMANDS.items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name, cls=parsing.Command if name in WITHOUT_TOOLS else parsing.ToolCommand)(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status."""
    return parsing.run(app, NAME, list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    raise SystemExit(main())

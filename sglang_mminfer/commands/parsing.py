"""How every command reads its words, prints its help and ends: exit statuses, the one form of errors, old names."""

from __future__ import annotations

import difflib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from sglang_mminfer.tools.errors import Failed, Refused

EXIT_STATUSES = {
    0: "done",
    1: "failed: a server died or is not there, or a check found an error",
    2: "wrong words: an unknown option, a bad value, a file that is not there",
    130: "interrupted by Ctrl-C; servers that were started are stopped",
}
"""What a command's exit status means."""

TOOLS = ("httpx", "imageio_ffmpeg", "jinja2", "matplotlib", "openai", "rich", "safetensors", "tokenizers")
"""Modules that the extra [tools] brings. Most are used late: a search that has run for an hour must not find out then
that it cannot draw."""

OLD_NAMES = {"--config": "--mminfer-config", "--configs": "--mminfer-config"}
"""Options by the names of version 0.1.0, and what they are called now. They are taken until the next release."""

OLD_REST = "--server-args"
"""The option of version 0.1.0 that took the rest of the line; now `--server-flags 'FLAGS'`."""

SEVERAL = "..."
"""How the metavar of an option ends that takes several words: `--lengths 4096 8192` is `--lengths 4096 --lengths 8192`.
"""


class Interrupted(Failed):
    """Ctrl-C ended the command."""

    exit_code = 130


class Command(TyperCommand):
    """A command that runs without the extra [tools]."""

    needs: tuple[str, ...] = ()
    """Modules without which the command does not begin."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asks_for_help = any(word in ctx.help_option_names for word in args)
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing and not asks_for_help and not ctx.resilient_parsing:
            error = Failed(f"needs {', '.join(missing)}, not installed here: pip install 'sglang-mminfer[tools]'")
            raise _of_command(error, ctx)
        known = {name for option in self.params for name in option.opts}
        if not ctx.resilient_parsing:
            args = list(_today(args, known, ctx.command_path))
        several = {name for option in self.params if _takes_several(option) for name in option.opts}
        return super().parse_args(ctx, list(_spread(args, several)))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            text = str(error) or "every server that the command started is stopped"
            raise _of_command(Interrupted(f"interrupted; {text}"), ctx) from None
        except (Failed, OSError) as error:
            raise _of_command(error, ctx) from error

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options, a section for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line, without arguments that are kept for old words only."""
        shown = [option for option in self.params if not getattr(option, "hidden", False)]
        pieces = [self.options_metavar] if self.options_metavar else []
        return [*pieces, *(piece for option in shown for piece in option.get_usage_pieces(ctx))]


class ToolCommand(Command):
    """A command that needs the extra [tools]."""

    needs = TOOLS


class Group(TyperGroup):
    """Commands under one name, each listed with the whole first paragraph of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(500)) for name, command in commands])


def new_app(**settings: Any) -> typer.Typer:
    """A Typer without rich: plain help, which COLUMNS bounds, and errors in the form of this module."""
    return typer.Typer(
        cls=Group,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        **settings,
    )


def run(app: typer.Typer, name: str, words: list[str]) -> int:
    """Run the command that the words name. Returns its exit status; errors are told in one form on standard error."""
    try:
        return typer.main.get_command(app).main(words, prog_name=name, standalone_mode=False) or 0
    except TyperException as error:
        return _tell_usage_error(error, name)
    except (Failed, OSError) as error:
        return tell(error, getattr(error, "command_path", name))


def tell(error: BaseException, command: str) -> int:
    """Print an error in the one form. Returns the exit status that it means."""
    print(f"{command}: {'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
    return getattr(error, "exit_code", 1)


def _tell_usage_error(error: Any, name: str) -> int:
    """As `tell`, for words that cannot be parsed."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx else name
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return 2
    print(f"{path}: error: {_usage_text(error, ctx)}\n{path} --help tells of every option.", file=sys.stderr)
    return 2


def _usage_text(error: Any, ctx: Any) -> str:
    """The sentence of an error, which begins with the option if its value is bad."""
    kind = type(error).__name__
    if kind == "BadParameter" and error.param is not None:
        is_option = error.param.param_type_name == "option"
        name = error.param.opts[0] if is_option else error.param.metavar or error.param.name.upper()
        return f"{name}: {_in_our_words(error.message)}"
    if kind == "NoSuchOption":
        offered = [name for option in ctx.command.params for name in option.opts if name.startswith("--")]
        near = difflib.get_close_matches(error.option_name, offered)
        return f"no such option: {error.option_name}" + (f". Did you mean {' or '.join(near)}?" if near else "")
    return error.format_message()


def _in_our_words(text: str) -> str:
    """What pydantic, with which typer reads values, says of one: "Input should be less than or equal to 8", say."""
    text = text.removesuffix(", unable to parse string as an integer").removesuffix(
        ", unable to parse string as a number"
    )
    return re.sub("^Input should be (?=greater|less)", "expected a number ", text).replace(
        "Input should be", "expected"
    )


def _of_command(error: Any, ctx: Any) -> Any:
    """The error, with the name of the command that it ended."""
    error.command_path = ctx.command_path
    return error


def _takes_several(option: Any) -> bool:
    return str(getattr(option, "metavar", None) or "").endswith(SEVERAL)


def _spread(words: list[str], several: set[str]) -> Iterator[str]:
    """The words, with the name of an option that takes several words before each of them."""
    name = None
    for number, word in enumerate(words):
        if word.startswith("-"):
            name = word if word in several else None
        elif name is not None and words[number - 1] != name:
            yield name
        yield word


def _today(words: list[str], known: set[str], command: str) -> Iterator[str]:
    """The words, with today's names for old ones. Standard error tells of each that was changed."""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if word == OLD_REST and OLD_REST not in known and "--server-flags" in known:
            flags = shlex.join(words[number + 1 :])
            print(f"{command}: note: {OLD_REST} A B is now --server-flags 'A B'", file=sys.stderr)
            yield from ("--server-flags", flags)
            return
        today = OLD_NAMES.get(option)
        if today in known and option not in known:
            print(f"{command}: note: {option} is now {today}", file=sys.stderr)
            yield f"{today}{equals}{value}"
        else:
            yield word


def bad(text: str) -> typer.BadParameter:
    """An error in the value of the option that is being read."""
    return typer.BadParameter(text)


__all__ = [
    "EXIT_STATUSES",
    "OLD_NAMES",
    "TOOLS",
    "Command",
    "Failed",
    "Group",
    "Interrupted",
    "Refused",
    "ToolCommand",
    "bad",
    "new_app",
    "run",
    "tell",
]

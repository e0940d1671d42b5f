"""The server's flags of this package: how SGLang's parser gets them, and how their values reach ServerArgs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from sglang_mminfer import settings

CONFIG_ATTRIBUTE = "_mminfer_config"
AUDIT_ATTRIBUTE = "_mminfer_audit"
"""Where the flags' values ride on ServerArgs. A real field cannot be added from outside; an attribute with an
underscore is pickled into SGLang's child processes all the same."""


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args."""
    if settings.CONFIG.flag in parser._option_string_actions:
        return
    parser.add_argument(
        settings.CONFIG.flag,
        type=config_argument,
        default=None,
        metavar="NAME|PATH",
        help="Head config of --attention-backend mminfer: the name of a built-in one or the path of a JSON "
        f"file. Overrides {settings.CONFIG.variable} and {settings.MODEL_KEY} in --json-model-override-args. "
        f"Default: {settings.CONFIG.default}.",
    )
    parser.add_argument(
        settings.AUDIT.flag,
        type=settings.share_of_requests,
        default=None,
        metavar="RATE",
        help="Share of requests, 0 to 1, of which --attention-backend mminfer computes sampled query rows again, "
        "densely, and records error and recall of every sparse layer in trace and metrics. Answers stay the same. "
        f"Overrides {settings.AUDIT.variable}. Default: 0, off.",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ServerArgs.from_cli_args."""
    server_args = original(cls, args)
    setattr(server_args, CONFIG_ATTRIBUTE, getattr(args, "mminfer_config", None))
    setattr(server_args, AUDIT_ATTRIBUTE, getattr(args, "mminfer_audit", None))
    return server_args


def config_argument(name: str) -> str:
    """argparse type of the flag: a bad config is a usage error, found before anything starts."""
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    if name:
        try:
            HeadConfig.load(name)
        except HeadConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name


def audit_rate(server_args: Any, environ: Mapping[str, str] | None = None) -> float:
    """The share of requests to audit: the flag's, else the environment's, else 0.

    Raises:
        argparse.ArgumentTypeError: if the environment names no share.
    """
    rate = getattr(server_args, AUDIT_ATTRIBUTE, None)
    return settings.audit_rate(environ) if rate is None else rate


def without_effect(server_args: Any) -> list[str]:
    """The flags that a server without mminfer was given."""
    given = ((settings.CONFIG.flag, CONFIG_ATTRIBUTE), (settings.AUDIT.flag, AUDIT_ATTRIBUTE))
    return [flag for flag, attribute in given if getattr(server_args, attribute, None)]

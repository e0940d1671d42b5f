"""This package's server flags: how SGLang's parser learns of them, and how their values reach ServerArgs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from sglang_mminfer import settings

CONFIG_ATTRIBUTE = "_mminfer_config"
AUDIT_ATTRIBUTE = "_mminfer_audit"
GUARD_ATTRIBUTE = "_mminfer_guard"
MEDIA_ROOT_ATTRIBUTE = "_mminfer_media_root"
"""Attributes of ServerArgs that hold the flags' values. A plugin cannot add a dataclass field, but SGLang pickles
attributes with an underscore into its child processes too."""


def add_cli_args(result: None, parser: argparse.ArgumentParser, *more: Any, **kwargs: Any) -> None:
    """AFTER ServerArgs.add_cli_args."""
    if settings.CONFIG.flag in parser._option_string_actions:
        return
    parser.add_argument(
        settings.CONFIG.flag,
        type=config_argument,
        default=None,
        metavar="NAME|PATH|hf://...",
        help="Head config of --attention-backend mminfer: the name of a built-in one or the path of a JSON file, here "
        f"or on the hub (hf://owner/repo[@revision]/path/file.json). Overrides {settings.CONFIG.variable} and "
        f"{settings.MODEL_KEY} in --json-model-override-args. Default: {settings.CONFIG.default}.",
    )
    parser.add_argument(
        settings.AUDIT.flag,
        type=settings.share_of_requests,
        default=None,
        metavar="RATE",
        help="Share of requests, 0 to 1, of which --attention-backend mminfer computes sampled query rows again, "
        "densely, and records error and recall of every sparse layer in trace and metrics. Answers stay the same. "
        f"Overrides {settings.AUDIT.variable}. Default: 0, or {settings.GUARD_AUDIT_RATE} for a guard.",
    )
    parser.add_argument(
        settings.GUARD.flag,
        type=settings.output_error,
        default=None,
        metavar="ERROR",
        help="The largest relative output error, above 0 to 1, that a head of --attention-backend mminfer may have in "
        "audited requests. One that exceeds it in several of them in a row runs dense for requests that begin "
        f"afterwards. Overrides {settings.GUARD.variable}. Default: 0, off.",
    )
    parser.add_argument(
        settings.MEDIA_ROOT.flag,
        type=settings.directory,
        default=None,
        metavar="DIR",
        help="The only directory from which clients of --attention-backend mminfer may name local files as media. URLs "
        f"and data: are not affected. Overrides {settings.MEDIA_ROOT.variable}. Default: any file.",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace, *more: Any, **kwargs: Any) -> Any:
    """AROUND ServerArgs.from_cli_args."""
    server_args = original(cls, args, *more, **kwargs)
    setattr(server_args, CONFIG_ATTRIBUTE, getattr(args, "mminfer_config", None))
    setattr(server_args, AUDIT_ATTRIBUTE, getattr(args, "mminfer_audit", None))
    setattr(server_args, GUARD_ATTRIBUTE, getattr(args, "mminfer_guard", None))
    setattr(server_args, MEDIA_ROOT_ATTRIBUTE, getattr(args, "mminfer_media_root", None))
    return server_args


def config_argument(name: str) -> str:
    """The argparse type of --mminfer-config: a bad head config is a usage error, before any process starts.

    Raises:
        argparse.ArgumentTypeError: if the head config cannot be loaded.
    """
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    if name:
        try:
            HeadConfig.load(name)
        except HeadConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name


def audit_rate(server_args: Any, environ: Mapping[str, str] | None = None) -> float:
    """The share of requests to audit: the flag's value, else the environment's, else what a guard needs, else 0.

    Raises:
        argparse.ArgumentTypeError: if a value of the environment is no number from 0 to 1.
    """
    rate = getattr(server_args, AUDIT_ATTRIBUTE, None)
    rate = settings.audit_rate(environ) if rate is None else rate
    if rate is not None:
        return rate
    return settings.GUARD_AUDIT_RATE if guard_error(server_args, environ) else 0.0


def guard_error(server_args: Any, environ: Mapping[str, str] | None = None) -> float:
    """The largest output error that the guard lets a head have: the flag's value, else the environment's; 0: no guard.

    Raises:
        argparse.ArgumentTypeError: if the environment's value is no number from 0 to 1.
    """
    error = getattr(server_args, GUARD_ATTRIBUTE, None)
    return settings.guard_error(environ) if error is None else error


def media_root(server_args: Any, environ: Mapping[str, str] | None = None) -> str | None:
    """The only directory of local media: the flag's value, else the environment's; None: any file.

    Raises:
        argparse.ArgumentTypeError: if the environment names no directory.
    """
    return getattr(server_args, MEDIA_ROOT_ATTRIBUTE, None) or settings.media_root(environ)


def without_effect(server_args: Any) -> list[str]:
    """The flags of this package that were set. For a server without mminfer, where they do nothing."""
    flags = (
        (settings.CONFIG.flag, CONFIG_ATTRIBUTE),
        (settings.AUDIT.flag, AUDIT_ATTRIBUTE),
        (settings.GUARD.flag, GUARD_ATTRIBUTE),
    )
    return [flag for flag, attribute in flags if getattr(server_args, attribute, None)]

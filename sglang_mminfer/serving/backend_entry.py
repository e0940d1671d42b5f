"""How SGLang learns of the backend: its name, and the factory that the scheduler calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_mminfer.serving.hooks import check_installation
from sglang_mminfer.settings import BACKEND_NAME


def add_choice(choices: list[str]) -> None:
    """Adds the backend's name to SGLang's list of attention backends."""
    if BACKEND_NAME not in choices:
        choices.append(BACKEND_NAME)


def create_backend(runner: Any) -> Any:
    """The factory in SGLang's attention registry. Our torch code is imported here and no earlier."""
    check_installation(warn=False)  # the launch has warned
    from sglang_mminfer.serving.backend import create_backend as create

    return create(runner)


NAMES = ("prefill_attention_backend_str", "decode_attention_backend_str")
"""The attributes of a model runner that name its attention backends."""


def wrap(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND attn_backend_wrapper: while SGLang looks at the names of the backends, ours is called by the name of the
    dense backend beneath it."""
    from sglang_mminfer.serving.dense_backend import dense_backend_name

    ours = [name for name in NAMES if getattr(runner, name, None) == BACKEND_NAME]
    for name in ours:
        setattr(runner, name, dense_backend_name(runner.server_args, runner.device))
    try:
        return original(runner, *args, **kwargs)
    finally:
        for name in ours:
            setattr(runner, name, BACKEND_NAME)

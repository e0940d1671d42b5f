"""How SGLang learns of the backend: its name, and the factory that the scheduler calls."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.serving.hooks import check_installation
from sglang_mminfer.settings import BACKEND_NAME


def add_choice(choices: list[str]) -> None:
    """Adds the backend's name to SGLang's list of attention backends."""
    if BACKEND_NAME not in choices:
        choices.append(BACKEND_NAME)


def create_backend(runner: Any) -> Any:
    """The factory in SGLang's attention registry. Our torch code is imported here and no earlier."""
    check_installation()
    from sglang_mminfer.serving.backend import create_backend as create

    return create(runner)

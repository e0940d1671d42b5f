"""How SGLang comes to know the backend: its name, and the factory that the scheduler calls."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.serving.hooks import check_installation
from sglang_mminfer.settings import BACKEND_NAME


def add_choice(choices: list[str]) -> None:
    if BACKEND_NAME not in choices:
        choices.append(BACKEND_NAME)


def create_backend(runner: Any) -> Any:
    """Factory in SGLang's attention registry; only here is torch code of ours imported."""
    check_installation()
    from sglang_mminfer.serving.backend import create_backend as create

    return create(runner)

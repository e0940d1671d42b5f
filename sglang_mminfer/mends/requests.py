"""Fields of a request that the scheduler, or what comes behind it, could not read: the client is told instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import sessions


def validate(original: Callable[..., None], self: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND TokenizerManager._validate_one_request."""
    if mends.wanted(self.server_args) and mends.active(sessions.NAME):
        sessions.check(getattr(obj, "session_params", None))
    original(self, obj, input_ids, *args, **kwargs)

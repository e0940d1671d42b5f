"""Fields of a request that the scheduler, or what comes behind it, could not read: the client is told instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import sessions

logger = logging.getLogger(__name__)

NAME = "request_fields"

_ODD = (TypeError, IndexError, KeyError, AttributeError, OverflowError)


@contextmanager
def readable() -> Iterator[None]:
    """What goes wrong while a request's fields are read is the client's error: of SGLang's own, only ValueError is."""
    try:
        yield
    except _ODD as error:
        logger.warning("mminfer: a request cannot be read: %r", error)  # no traceback: clients decide how often
        raise ValueError(f"request: cannot be read: {type(error).__name__}: {error}") from error


def normalize(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND GenerateReqInput.normalize_batch_and_arguments."""
    if not mends.here(NAME):
        return original(self, *args, **kwargs)
    with readable():
        return original(self, *args, **kwargs)


def validate(original: Callable[..., None], self: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND TokenizerManager._validate_one_request."""
    if mends.wanted(self.server_args):
        if mends.active(NAME):
            if isinstance(ids := getattr(obj, "input_ids", None), list):
                check_ids(ids, self.model_config.vocab_size)
            _check_numbers(obj, self.model_config.vocab_size)
            if not input_ids and not getattr(obj, "session_params", None) and obj.input_embeds is None:
                raise ValueError("prompt: expected at least one token, got none")
        if mends.active(sessions.NAME):
            sessions.check(getattr(obj, "session_params", None))
    original(self, obj, input_ids, *args, **kwargs)


def media_in(request: Any, kind: str) -> list[Any]:
    """The media of one kind ("image", "video", "audio") that a request brings, which may come as one or as a list."""
    media = getattr(request, f"{kind}_data", None) or ()
    return list(media) if isinstance(media, list | tuple) else [media]


def check_ids(ids: Sequence[Any], vocabulary: int) -> None:
    """Raises ValueError for token ids of a client that the model has no embedding of."""
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"input_ids[{place}]: expected a token id from 0 to {vocabulary - 1}, got {token!r:.40}")


def _check_numbers(obj: Any, vocabulary: int) -> None:
    """Raises ValueError for numbers of log-probabilities that no tensor could be indexed with."""
    for name, least, most in (("top_logprobs_num", 0, vocabulary), ("logprob_start_len", -1, 1 << 31)):
        value = getattr(obj, name, None)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r:.40}")

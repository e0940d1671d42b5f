"""Fields of a request that would end the scheduler, or the processes after it: the client gets an error instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import sessions

logger = logging.getLogger(__name__)

NAME = "request_fields"

# What SGLang's code raises when a field has a type or a length that it does not expect.
_ODD = (TypeError, IndexError, KeyError, AttributeError, OverflowError)


@contextmanager
def readable() -> Iterator[None]:
    """While SGLang reads a request's fields, turns the errors in `_ODD` into ValueError.

    SGLang answers ValueError as the client's error (400), and every other exception as its own (500).

    Raises:
        ValueError: naming the error.
    """
    try:
        yield
    except _ODD as error:
        # No traceback: a client could fill the log with them.
        logger.warning("mminfer: a request cannot be read: %r", error)
        raise ValueError(f"request: cannot be read: {type(error).__name__}: {error}") from error


def normalize(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND GenerateReqInput.normalize_batch_and_arguments."""
    if not mends.here(NAME):
        return original(self, *args, **kwargs)
    with readable():
        return original(self, *args, **kwargs)


def validate(original: Callable[..., None], self: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND TokenizerManager._validate_one_request.

    Raises:
        ValueError: naming the field that the scheduler could not use.
    """
    if mends.wanted(self.server_args):
        if mends.active(NAME):
            if isinstance(ids := getattr(obj, "input_ids", None), list):
                check_ids(ids, self.model_config.vocab_size)
            _check_numbers(obj, self.model_config.vocab_size)
            # Where another server encodes the media, the scheduler makes the prompt.
            later = getattr(obj, "session_params", None) or getattr(obj, "need_wait_for_mm_inputs", False)
            if not input_ids and not later and obj.input_embeds is None:
                raise ValueError("prompt: expected at least one token, got none")
        if mends.active(sessions.NAME):
            sessions.check(getattr(obj, "session_params", None))
    original(self, obj, input_ids, *args, **kwargs)


def media_in(request: Any, kind: str) -> list[Any]:
    """The media of one kind ("image", "video", "audio") in a request, which holds one medium or a list of them."""
    media = getattr(request, f"{kind}_data", None) or ()
    return list(media) if isinstance(media, list | tuple) else [media]


def check_ids(ids: Sequence[Any], vocabulary: int) -> None:
    """Checks token ids that a client sent.

    Args:
        vocabulary: rows of the model's embedding.

    Raises:
        ValueError: naming the first entry that is no integer from 0 to `vocabulary` - 1.
    """
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"input_ids[{index}]: expected a token id from 0 to {vocabulary - 1}, got {token!r:.40}")


def _check_numbers(obj: Any, vocabulary: int) -> None:
    """Raises ValueError for a number of log-probabilities, or a first position, that cannot index a tensor."""
    for name, least, most in (("top_logprobs_num", 0, vocabulary), ("logprob_start_len", -1, 1 << 31)):
        value = getattr(obj, name, None)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r:.40}")

"""The prompt length of each request in the current batch, as SGLang's scheduler knows it.

A forward batch holds the length of a chunk, not of the prompt. Its mode does not tell generated tokens from prompt
tokens either: generated tokens come as prompt rows after a retraction, beside requests that prefill (SGLang turns MIXED
into EXTEND before the attention backend sees the batch), and under data-parallel attention. The request knows: its
`origin_input_ids` are the prompt, with a session's earlier turns and without the tokens generated for this request.

This module imports nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_lengths: dict[str, int] = {}
_count_verified: Callable[[int, int], None] | None = None


def watch(count_verified: Callable[[int, int], None]) -> None:
    """Keeps the lengths from now on. The attention backend calls this, so a scheduler without it keeps none.

    Args:
        count_verified: called with the numbers of requests and rows of each batch that verifies drafts. The backend
            itself is not asked about those that a CUDA graph replays.
    """
    global _count_verified
    _count_verified = count_verified


def note(result: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ForwardBatch.init_new, which turns a schedule batch into a forward batch right before it runs."""
    if _count_verified is None:
        return
    if batch.forward_mode.is_target_verify():
        _count_verified(len(batch.reqs), len(batch.input_ids))
    elif not batch.forward_mode.is_decode_or_idle():
        keep({request.rid: len(request.origin_input_ids) for request in batch.reqs})


def keep(lengths: dict[str, int]) -> None:
    """Sets the prompt length in tokens, by request id, of the batch that runs next, and drops the previous batch's."""
    global _lengths
    _lengths = lengths


def length_of(rid: str) -> int | None:
    """Tokens in the prompt of a request of the current batch; None if SGLang did not tell."""
    return _lengths.get(rid)

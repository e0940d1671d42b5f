"""Turns of a session: what a turn inherits of the media before it, and what SGLang's scheduler would die of.

A turn's prompt is its parent's prompt and answer, cut at `offset`, and the new tokens. SGLang cuts the tokens and hands
on the media whole, so that the encoder's rows are more than the places left for them; the scheduler ends there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_mminfer import mends

logger = logging.getLogger(__name__)

NAME = "sessions"

_INHERITED = "_mminfer_inherited"
"""On a request: the media that it began with, which its own children have when it is aborted."""

_FIELDS: dict[str, type] = {"id": str, "rid": str, "offset": int, "replace": bool, "drop_previous_output": bool}


class LostHistory(ValueError):
    """A turn cannot have what it asks for of the turns before it; the client is told."""


def check(params: Any) -> None:
    """Raises ValueError for `session_params` that the scheduler could not read. In the tokenizer's process."""
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise ValueError(f"session_params: expected an object, got {type(params).__name__}")
    if unknown := [key for key in params if key not in _FIELDS]:
        raise ValueError(f"session_params: expected only {', '.join(_FIELDS)}, got {unknown[0]!r}")
    for key, value in params.items():
        kind = _FIELDS[key]
        if value is not None and type(value) is not kind:
            raise ValueError(f"session_params.{key}: expected {_WORDS[kind]}, got {value!r:.60}")
    if (offset := params.get("offset")) is not None and not 0 <= offset < 1 << 31:
        raise ValueError(f"session_params.offset: expected a number of tokens >= 0, got {offset}")


_WORDS = {str: "a string", int: "an integer", bool: "true or false"}


def create_request(original: Callable[..., Any], self: Any, turn: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Session.create_req."""
    if not mends.here(NAME):
        return original(self, turn, *args, **kwargs)
    params = turn.session_params
    if params.replace and params.rid is None and not self.streaming:
        _clear(self)
    node = _parent_of(self, params)
    created = original(self, turn, *args, **kwargs)
    if created.to_finish is not None:
        # SGLang has put one token in place of the prompt, and would go on to lay the turn's media out in it.
        turn.mm_inputs = None
    elif node is not None:
        try:
            _inherit(created, node.req, len(created.origin_input_ids) - len(turn.input_ids))
        except LostHistory as error:
            created.set_finish_with_abort(f"session_params: {error}")
            turn.mm_inputs = None
        if node.req.finished_reason is None:
            # Replaced while it runs: what it frees when it ends is the new turn's now.
            node.req._session_mm_items.clear()
    return created


def close(original: Callable[..., None], self: Any, session_id: str) -> None:
    """AROUND SessionController._close: not while a turn's media are still to be read.

    SGLang itself waits for turns of streaming sessions only, and `maybe_reap` comes back to those that wait.
    """
    session = self.sessions[session_id]
    if mends.here(NAME) and not session.streaming and not self._all_requests_finished(session):
        session.close_on_finish = True
        return
    original(self, session_id)


def media_of(original: Callable[..., Any], self: Any, media: Any) -> Any:
    """AROUND Scheduler._get_multimodal_inputs: what cannot be read is the request's error, not the scheduler's end."""
    from sglang.srt.managers.scheduler import _MultimodalInputProcessingError

    try:
        return original(self, media)
    except _MultimodalInputProcessingError:
        raise
    except Exception as error:
        if not mends.here(NAME):
            raise
        logger.warning("mminfer: the media of a request cannot be read: %r", error)
        raise _MultimodalInputProcessingError(f"media: cannot be read: {type(error).__name__}: {error}") from error


def _clear(session: Any) -> None:
    """Ends and forgets all turns; SGLang's own way changes a dictionary that it walks, which ends the scheduler."""
    for node in session.req_nodes.values():
        node.abort()
    session.req_nodes.clear()


def _parent_of(session: Any, params: Any) -> Any:
    """The turn that a new one goes on from, None for a first one or where SGLang will refuse."""
    if session.streaming:
        return next(iter(session.req_nodes.values()), None)
    return None if params.rid is None else session.req_nodes.get(params.rid)


def _inherit(turn: Any, before: Any, length: int) -> None:
    """Leaves a turn those media of its ancestors that stand in the first `length` tokens of its prompt.

    Raises:
        LostHistory: if a medium is cut in two, or tokens of one remain whose features are gone.
    """
    if _was_refused(before):
        raise LostHistory(f"rid: the request {before.rid!r} was refused, so nothing can follow it")
    inherited = _media_of(before)
    if inherited is not None and length < len(before.origin_input_ids):
        kept = _before(inherited.mm_items, length)
        if len(kept) < len(inherited.mm_items):
            inherited = _cut(inherited, kept, length, len(turn.origin_input_ids)) if kept else None
    if inherited is not turn.multimodal_inputs:
        turn.multimodal_inputs = inherited
        turn.mm_token_counts_ready = False
        turn.mm_image_tokens = turn.mm_audio_tokens = turn.mm_video_tokens = 0
    setattr(turn, _INHERITED, inherited)
    _check_all_there(turn, length, before.rid)


def _was_refused(request: Any) -> bool:
    """Whether SGLang put one token in place of a prompt that it did not take."""
    ids, unpadded = request.origin_input_ids, request.origin_input_ids_unpadded
    return request.finished() and len(ids) == 1 and ids[0] == 0 and len(unpadded) > 1


def _media_of(request: Any) -> Any:
    """The media of a turn; of an aborted one, which has let go of all, those that it inherited."""
    if request.multimodal_inputs is not None:
        return request.multimodal_inputs
    return getattr(request, _INHERITED, None)


def _before(items: Sequence[Any], length: int) -> list[Any]:
    """The items of media that stand in the first `length` tokens.

    Raises:
        LostHistory: naming the medium that is cut.
    """
    from sglang_mminfer.modality.items import extents_of

    if not all(item.offsets for item in items):
        raise LostHistory("offset: media of this model do not say where they stand, so no turn can be cut")
    kept = []
    for start, stop, of_medium in extents_of(items):
        if start < length < stop:
            kind = str(getattr(of_medium[0].modality, "name", "medium")).lower()
            raise LostHistory(
                f"offset: {length} is inside the {kind} at tokens [{start}, {stop - 1}]; expected one before, or "
                f"behind it: at most {start}, or at least {stop}"
            )
        if stop <= length:
            kept += of_medium
    return kept


def _cut(media: Any, kept: list[Any], length: int, whole: int) -> Any:
    """A copy with the items that are left, its positions going on as text from token `length` to `whole`."""
    positions, delta = media.mrope_positions, media.mrope_position_delta
    if positions is not None:
        import torch

        prefix = positions[:, :length]
        following = int(prefix.max()) + 1
        text = torch.arange(whole - prefix.shape[1], dtype=positions.dtype, device=positions.device) + following
        positions = torch.cat([prefix, text.expand(3, -1)], dim=1)
        delta = (positions.max() + 1 - whole).reshape(1, 1)
    modalities = media.token_modalities
    return dataclasses.replace(
        media,
        mm_items=kept,
        padded_input_ids=None,
        token_modalities=None if modalities is None else modalities[:length],
        mrope_positions=positions,
        mrope_position_delta=delta,
        mrope_position_delta_repeated_cache=None,
    )


def _check_all_there(turn: Any, length: int, rid: str) -> None:
    """Raises LostHistory where a token of a medium has no item, or an item has nothing to encode."""
    import numpy as np
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    prefix = np.frombuffer(turn.origin_input_ids, dtype=np.int64)[:length]
    places = np.flatnonzero(prefix >= MM_PAD_SHIFT_VALUE)
    items = () if turn.multimodal_inputs is None else turn.multimodal_inputs.mm_items
    explained = np.zeros(len(places), dtype=bool)
    for item in items:
        for first, last in item.offsets or ():
            explained[np.searchsorted(places, first) : np.searchsorted(places, last, side="right")] = True
    gone = any(item.feature is None and item.precomputed_embeddings is None for item in items)
    if gone or not explained.all():
        raise LostHistory(f"rid: the media of the request {rid!r} are gone (it was aborted); name an earlier one")

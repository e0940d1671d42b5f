"""Turns of a session: which media a turn inherits, and requests that would end SGLang's scheduler.

A turn's prompt is its parent's prompt and answer, cut at `offset`, and then the new tokens. SGLang cuts the tokens but
hands on all of the media. The encoder then makes more rows than the prompt has places for, and the scheduler ends.
"""

from __future__ import annotations

import dataclasses
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import routed

logger = logging.getLogger(__name__)

NAME = "sessions"

_INHERITED = "_mminfer_inherited"
"""Attribute of a request: the media that it inherited. Its children inherit them if the request is aborted."""

_pads: Callable[[Any, Any], Any] | None = None
"""How the model of this scheduler puts numbers of media in place of placeholders; some models leave these as they
are."""

_FIELDS: dict[str, type] = {"id": str, "rid": str, "offset": int, "replace": bool, "drop_previous_output": bool}


class LostHistory(ValueError):
    """The media of earlier turns that a turn asks for are cut in two or gone. The client gets the message."""


def check(params: Any) -> None:
    """Checks the `session_params` of a request, in the tokenizer's process.

    Raises:
        ValueError: naming a key or value that the scheduler could not use.
    """
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
    """AROUND Session.create_req, in the scheduler."""
    if not mends.here(NAME):
        return original(self, turn, *args, **kwargs)
    params = turn.session_params
    if params.replace and params.rid is None and not self.streaming:
        _clear(self)
    parent = _parent_of(self, params)
    created = original(self, turn, *args, **kwargs)
    if created.to_finish is not None:
        # SGLang refused the turn and replaced its prompt by one token. It would now place the turn's media in that.
        turn.mm_inputs = None
    elif parent is not None:
        try:
            _inherit(created, parent.req, len(created.origin_input_ids) - len(turn.input_ids))
        except LostHistory as error:
            created.set_finish_with_abort(f"session_params: {error}")
            turn.mm_inputs = None
        if parent.req.finished_reason is None:
            # The parent still runs and is replaced. When it ends it would free media that the new turn now has.
            parent.req._session_mm_items.clear()
    return created


def place_media(original: Callable[..., None], turn: Any, request: Any, media: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND SessionController.adjust_mm_offsets, which moves a turn's media behind the history.

    SGLang then lets the model put the numbers of the turn's media in place of placeholders. Models that look for pairs
    of tokens (InternVL and others) find those of the history first, and put the new numbers there: what is cached is
    found no more, and when the history is computed again the scheduler ends. So here the model gets the turn's own
    tokens alone.
    """
    own = len(turn.input_ids)
    follows = own < len(request.origin_input_ids) and media.padded_input_ids is None
    if follows and _pads is not None and all(item.offsets for item in media.mm_items) and mends.here(NAME):
        ids = _pads(array("q", turn.input_ids), media)
        if len(ids) == own:
            media.padded_input_ids = ids[:]
    original(turn, request, media, *args, **kwargs)


def close(original: Callable[..., None], self: Any, session_id: str, *args: Any, **kwargs: Any) -> None:
    """AROUND SessionController._close: a session with a running turn closes when the turn ends.

    SGLang itself waits for turns of streaming sessions only. Its `maybe_reap` later closes the sessions that wait.
    """
    session = self.sessions[session_id]
    if mends.here(NAME) and not session.streaming and not self._all_requests_finished(session):
        session.close_on_finish = True
        return
    original(self, session_id, *args, **kwargs)


def media_of(original: Callable[..., Any], self: Any, mm_inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Scheduler._get_multimodal_inputs: unreadable media fail their request and do not end the scheduler."""
    global _pads
    _pads = getattr(self, "pad_input_ids_func", None)
    from sglang.srt.managers.scheduler import _MultimodalInputProcessingError

    try:
        routed.separate(self.server_args, mm_inputs)
        return original(self, mm_inputs, *args, **kwargs)
    except _MultimodalInputProcessingError:
        raise
    except Exception as error:
        if not mends.here(NAME):
            raise
        logger.warning("mminfer: the media of a request cannot be read: %r", error)
        raise _MultimodalInputProcessingError(f"media: cannot be read: {type(error).__name__}: {error}") from error


def _clear(session: Any) -> None:
    """Aborts and forgets all turns. SGLang's own loop changes the dictionary that it walks: the scheduler would end."""
    for node in session.req_nodes.values():
        node.abort()
    session.req_nodes.clear()


def _parent_of(session: Any, params: Any) -> Any:
    """The turn that a new turn continues; None for a first turn, or if SGLang will refuse the new one."""
    if session.streaming:
        return next(iter(session.req_nodes.values()), None)
    return None if params.rid is None else session.req_nodes.get(params.rid)


def _inherit(turn: Any, parent: Any, length: int) -> None:
    """Sets the media of a turn to those of its ancestors that lie in the first `length` tokens of its prompt.

    Raises:
        LostHistory: if `length` cuts a medium in two, or the features of a medium in the prompt are gone.
    """
    if _was_refused(parent):
        raise LostHistory(f"rid: the request {parent.rid!r} was refused, so nothing can follow it")
    inherited = _media_of(parent)
    if inherited is not None and length < len(parent.origin_input_ids):
        items = _before(inherited.mm_items, length)
        if len(items) < len(inherited.mm_items):
            inherited = _cut(inherited, items, length, len(turn.origin_input_ids)) if items else None
    if inherited is not turn.multimodal_inputs:
        turn.multimodal_inputs = inherited
        turn.mm_token_counts_ready = False
        turn.mm_image_tokens = turn.mm_audio_tokens = turn.mm_video_tokens = 0
    setattr(turn, _INHERITED, inherited)
    _check_all_there(turn, length, parent.rid)


def _was_refused(request: Any) -> bool:
    """Whether SGLang refused the request, and so replaced its prompt by one token."""
    ids, unpadded = request.origin_input_ids, request.origin_input_ids_unpadded
    return request.finished() and len(ids) == 1 and ids[0] == 0 and len(unpadded) > 1


def _media_of(request: Any) -> Any:
    """The media of a turn. An aborted turn has dropped its media; it still knows those that it inherited."""
    if request.multimodal_inputs is not None:
        return request.multimodal_inputs
    return getattr(request, _INHERITED, None)


def _before(items: Sequence[Any], length: int) -> list[Any]:
    """The items whose media end within the first `length` tokens.

    Raises:
        LostHistory: naming the medium that `length` cuts in two, or if the items have no offsets.
    """
    from sglang_mminfer.modality.items import extents_of

    if not all(item.offsets for item in items):
        raise LostHistory("offset: media of this model do not say where they stand, so no turn can be cut")
    items_before = []
    for start, stop, medium in extents_of(items):
        if start < length < stop:
            kind = str(getattr(medium[0].modality, "name", "medium")).lower()
            raise LostHistory(
                f"offset: {length} is inside the {kind} at tokens [{start}, {stop - 1}]; expected one before, or "
                f"behind it: at most {start}, or at least {stop}"
            )
        if stop <= length:
            items_before += medium
    return items_before


def _cut(media: Any, items: list[Any], length: int, total: int) -> Any:
    """A copy of a parent's media with only `items`.

    Args:
        length: tokens of the prompt that the parent gave.
        total: tokens of the whole prompt. Their M-RoPE positions from `length` on are those of text.
    """
    positions, delta = media.mrope_positions, media.mrope_position_delta
    if positions is not None:
        import torch

        prefix = positions[:, :length]
        following = int(prefix.max()) + 1
        text = torch.arange(total - prefix.shape[1], dtype=positions.dtype, device=positions.device) + following
        positions = torch.cat([prefix, text.expand(3, -1)], dim=1)
        delta = (positions.max() + 1 - total).reshape(1, 1)
    modalities = media.token_modalities
    return dataclasses.replace(
        media,
        mm_items=items,
        padded_input_ids=None,
        token_modalities=None if modalities is None else modalities[:length],
        mrope_positions=positions,
        mrope_position_delta=delta,
        mrope_position_delta_repeated_cache=None,
    )


def _check_all_there(turn: Any, length: int, rid: str) -> None:
    """Raises LostHistory if a media token of the prompt has no item, or an item has neither features nor embeddings."""
    import numpy as np
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    prefix = np.frombuffer(turn.origin_input_ids, dtype=np.int64)[:length]
    positions = np.flatnonzero(prefix >= MM_PAD_SHIFT_VALUE)
    items = () if turn.multimodal_inputs is None else turn.multimodal_inputs.mm_items
    covered = np.zeros(len(positions), dtype=bool)
    for item in items:
        for first, last in item.offsets or ():
            covered[np.searchsorted(positions, first) : np.searchsorted(positions, last, side="right")] = True
    without_features = any(item.feature is None and item.precomputed_embeddings is None for item in items)
    if without_features or not covered.all():
        raise LostHistory(f"rid: the media of the request {rid!r} are gone (it was aborted); name an earlier one")

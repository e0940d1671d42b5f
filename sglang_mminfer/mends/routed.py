"""Prompts that a router sends as token ids and pixels (SMG's gRPC server): their media, and where these are."""

from __future__ import annotations

from typing import Any

from sglang_mminfer import mends


def by_router(server_args: Any) -> bool:
    """Whether requests reach the server's scheduler from a router, as token ids and pixels."""
    return bool(server_args.grpc_mode or server_args.smg_grpc_mode)


def separate(server_args: Any, made: Any) -> None:
    """Makes each picture of a prompt a medium of its own, as SGLang's tokenizer process does. A router sends them as
    one, so that a further picture changes the hash of all, and nothing that is cached fits.

    Args:
        server_args: of the scheduler. Other servers than a router's have separated them before.
        made: the MultimodalProcessorOutput that came with a request. Its items are replaced.
    """
    if by_router(server_args) and mends.here("router_pictures") and getattr(made, "mm_items", None):
        from sglang.srt.managers.mm_utils import get_new_expanded_mm_items

        made.mm_items = get_new_expanded_mm_items(made.mm_items)


def compute_positions(original: Any, self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Scheduler._maybe_compute_mrope_positions: a request may have media without positions. SGLang looks for
    the tokens of media in the ids to place them, and by then it has put other numbers there."""
    if not mends.here("router_positions"):
        return original(self, req, *args, **kwargs)
    media, processor = req.multimodal_inputs, self._mm_processor
    if media is None or media.mrope_positions is not None or not _places_media(processor):
        return original(self, req, *args, **kwargs)
    padded = req.origin_input_ids
    try:
        req.origin_input_ids = with_tokens(padded, media.mm_items, processor.mm_tokens)
        return original(self, req, *args, **kwargs)
    except Exception as error:  # a router's mistake must not end the scheduler
        why = f"media: cannot be placed in the prompt: {type(error).__name__}: {error}"
    finally:
        req.origin_input_ids = padded
    req.set_finish_with_abort(why)


def with_tokens(ids: Any, items: Any, tokens: Any) -> list[int]:
    """The ids of a prompt with each medium's token where the medium is.

    Args:
        ids: with SGLang's own numbers there.
        items: its MultimodalDataItems.
        tokens: SGLang's MultimodalSpecialTokens of the model.
    """
    found = list(ids)
    for item in items:
        token = tokens.get_token_id_by_modality(item.modality)
        for start, last in (item.offsets or []) if token is not None else []:
            found[start : last + 1] = [token] * (last + 1 - start)
    return found


def _places_media(processor: Any) -> bool:
    """Whether a processor of SGLang finds positions by the tokens of media; those of models without M-RoPE do not."""
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    own = getattr(type(processor), "compute_mrope_positions", None)
    of_base = own is None or own is BaseMultimodalProcessor.compute_mrope_positions
    return not of_base and getattr(processor, "mm_tokens", None) is not None

"""The media processor of a server with mminfer, for every family: SGLang's own class with the mends on top.

An instance changes its class at the end of the constructor of SGLang's base class. So a processor is mended wherever it
is made, and a processor of another server in the same process is not.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

from sglang_mminfer import families, mends
from sglang_mminfer.mends import (
    asked,
    identity,
    media_cache,
    pictures,
    places,
    stages,
    token_ids,
    verbatim,
    video_features,
    videos,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def adapted(kind: type, hf_config: Any) -> type:
    """A family's class in place of `kind`, a processor class of SGLang; `kind` itself if no family replaces it."""
    for family in families.known():
        if kind.__name__ in family.processors and (family.mend is None or mends.active(family.mend)):
            ours = family.processor(kind, hf_config)
            if ours is not None:
                return ours
    return kind


def adapt_model(resolved: tuple[type, str], *args: Any, **kwargs: Any) -> tuple[type, str] | None:
    """AFTER get_model_architecture: a family's class in place of SGLang's, else None (SGLang's stays)."""
    if not asked.for_mminfer():
        return None
    kind, architecture = resolved
    for family in families.known():
        if family.mend is None or mends.active(family.mend):
            ours = family.model(kind, architecture)
            if ours is not None:
                return ours, architecture
    return None


def mend_processor(result: None, self: Any, hf_config: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER BaseMultimodalProcessor.__init__: mends the new instance."""
    if not mends.wanted(server_args):
        return
    self.__class__ = _mended(adapted(type(self), hf_config))
    self._processor = verbatim.aware_processor(self._processor)
    self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
    video_features.keep(self._processor)
    stages.follow(self.io_executor)
    if hasattr(self, "check_options"):
        self.check_options()


@functools.cache
def _mended(base: Any) -> type:
    # They import more than a process without media needs.
    from sglang_mminfer.families import encoded
    from sglang_mminfer.families import item_checks as items

    signature = inspect.signature(base.process_mm_data_async)

    class Mended(base):
        """The processor class `base` with the mends that every family needs."""

        @classmethod
        def _load_single_item(cls, data: Any, modality: Any, *args: Any, **kwargs: Any) -> Any:
            load = super()._load_single_item
            if cls._is_preprocessed_input(data):
                return data
            if modality.name == "IMAGE":
                return pictures.load(load, cls, data, modality, *args, **kwargs)
            if modality.name == "VIDEO":
                with stages.timed("open_ms"):
                    return videos.load(load, cls, data, modality, *args, **kwargs)
            return load(data, modality, *args, **kwargs)

        def snapshot_media_source(self, source: Any, modality: Any) -> Any:
            if modality.name != "IMAGE":
                return super().snapshot_media_source(source, modality)
            return pictures.snapshot(super().snapshot_media_source, type(self), source, modality)

        def decode_media_snapshot(self, snapshot: Any, modality: Any) -> Any:
            decode = functools.partial(super().decode_media_snapshot, snapshot)
            if modality.name != "IMAGE" or not pictures.is_file(snapshot.data):
                return decode(modality)
            return pictures.load(lambda data, modality, *_: decode(modality), type(self), snapshot.data, modality)

        @staticmethod
        def get_mm_items_offset(input_ids: torch.Tensor, mm_token_id: int) -> list[tuple[int, int]]:
            return places.runs_of(base.get_mm_items_offset, input_ids, mm_token_id)

        def clear_preprocess_cache(self) -> None:
            super().clear_preprocess_cache()
            media_cache.of_process().clear()

        def process_and_combine_mm_data(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().process_and_combine_mm_data(*args, **kwargs)
            except StopIteration as error:  # a future cannot hold StopIteration: the client would wait for ever
                raise ValueError("prompt: it has more placeholders than media") from error

        def get_validated_mm_data(self, prompt: Any, embeddings: Any, **kwargs: Any) -> Any:
            output = super().get_validated_mm_data(prompt, embeddings, **kwargs)
            encoded.place(output, self.hf_config, kwargs)
            identity.add(output, None)
            return output

        async def process_and_combine_mm_data_async(self, *args: Any, **kwargs: Any) -> Any:
            with stages.timed("process_ms"):
                return await super().process_and_combine_mm_data_async(*args, **kwargs)

        async def process_mm_data_async(self, *args: Any, **kwargs: Any) -> Any:
            call = signature.bind(self, *args, **kwargs)
            given = {**call.arguments, **call.arguments.get("kwargs", {})}
            with stages.of_request(str(getattr(given["request_obj"], "rid", ""))):
                return await self._prepared(call, given["request_obj"], given["input_text"])

        async def _prepared(self, call: inspect.BoundArguments, request: Any, prompt: Any) -> Any:
            try:
                items.check_preprocessed(request)
                prompt = token_ids.as_text(self, prompt, request)
                items.check_placeholders(self, prompt, request)
                call.arguments["input_text"] = prompt
                output = await super().process_mm_data_async(*call.args[1:], **call.kwargs)
                if output is not None:
                    items.check(output, self)
                items.check_read(output, self, request)
                if output is not None:
                    identity.add(output, request)
            except (ValueError, MemoryError, ImportError, asyncio.CancelledError):
                raise
            except Exception as error:
                if type(error).__module__.startswith("torch"):
                    raise  # an error of the device, not of the client
                # A line and no traceback: clients decide how often this happens.
                logger.warning("mminfer: media of request %s: %r", getattr(request, "rid", ""), error)
                logger.debug("mminfer: where it failed", exc_info=True)
                raise ValueError(f"media: could not be processed: {type(error).__name__}: {error}") from error
            return output

    Mended.__name__ = Mended.__qualname__ = f"Mended{base.__name__}"
    return Mended

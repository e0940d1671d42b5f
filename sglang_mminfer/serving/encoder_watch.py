"""Watches SGLang's cache of vision embeddings, and counts what the vision encoder does again if the cache is too small.

A prompt is prefilled in chunks, and each chunk with tokens of a video needs all of the video's embeddings. SGLang keeps
them between chunks in a cache of SGLANG_VLM_CACHE_SIZE_MB (by default 100 MB: 14,600 tokens of a 7B model in bf16). The
cache silently refuses a larger entry, and the vision encoder runs again on the whole video for every chunk.
`EncoderWatch` sees this; `mminfer doctor --video` predicts it. SGLang's behaviour does not change.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ENVIRONMENT = "SGLANG_VLM_CACHE_SIZE_MB"
MB = 2**20  # as SGLang counts megabytes

STEP_MB = 64
"""Suggested cache sizes are multiples of this, which leaves room for an image or two beside a video."""

REMEMBERED = 1024
"""How many refused entries the watch remembers: the keys of the latest ones, not their embeddings."""


def entries_of(items: Sequence[Any]) -> list[tuple[int | None, list[Any]]]:
    """The cache entries, as (key, items), that SGLang makes of items which it encodes together.

    An item of one span is an entry of its own. If any item has several spans (a video with timestamps between its
    frames), all items of the request's modality are one entry.
    """
    if all(len(item.offsets) == 1 or item.is_audio() for item in items):
        return [(item.hash, [item]) for item in items]
    from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache

    return [(MultiModalStaticCache.combine_hashes([item.hash for item in items]), list(items))]


def tokens_of(items: Iterable[Any]) -> int:
    """The tokens that stand for these items in their prompts."""
    return sum(stop - start + 1 for item in items for start, stop in item.offsets)


def suggested_mb(needed: int) -> int:
    """A size for SGLang's cache, in MB, that holds `needed` bytes."""
    return max(1, math.ceil(needed / (STEP_MB * MB))) * STEP_MB


@dataclass(frozen=True)
class EncodedAgain:
    """How many entries were encoded although they had been encoded before, and the time that this took."""

    times: int = 0
    milliseconds: float = 0.0


@dataclass(frozen=True)
class _Span:
    """A stretch of time: two readings of the host's clock, or two events of a GPU stream."""

    start: Any
    stop: Any

    def seconds(self, wait: bool = False) -> float | None:
        """Its length. None if the GPU has not reached its end yet; with `wait` the host waits for that."""
        if isinstance(self.start, float):
            return self.stop - self.start
        if wait:
            self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3 if wait or self.stop.query() else None


@dataclass(frozen=True)
class _Encoding:
    """One run of the vision encoder.

    Attributes:
        entries: the cache entries that it made, as `entries_of` gives them.
        bytes_per_token: bytes of one token's embedding.
        span: when it ran.
    """

    entries: list[tuple[int | None, list[Any]]]
    bytes_per_token: int
    span: _Span


class EncoderWatch:
    """Times the vision encoder, counts entries that it makes again because the cache refused them, and warns once.

    An entry counts only if a chunk begins in its middle. The same picture in two conversations may be encoded twice as
    well, but that also happens to a server without chunks.
    """

    def __init__(self) -> None:
        self._refused: OrderedDict[int | None, None] = OrderedDict()
        self._unread: list[tuple[_Span, float]] = []  # with the share of each that encoded something again
        self._runs: list[_Span] = []
        self._times = 0
        self._warned = False
        self.active = True

    def take(self) -> EncodedAgain:
        """What was counted since the last call.

        The time of work that a GPU has not finished comes with a later call.
        """
        if not self._times and not self._unread:
            return EncodedAgain()
        times, self._times = self._times, 0
        measured = [(span.seconds(), share) for span, share in self._unread]
        self._unread = [entry for entry, (seconds, _) in zip(self._unread, measured) if seconds is None]
        return EncodedAgain(times, 1e3 * sum(seconds * share for seconds, share in measured if seconds is not None))

    def milliseconds(self) -> float:
        """How long the vision encoder ran since the last call. What a GPU has not finished comes with a later call."""
        if not self._runs:
            return 0.0
        measured = [(span, span.seconds()) for span in self._runs]
        self._runs = [span for span, seconds in measured if seconds is None]
        return 1e3 * sum(seconds or 0.0 for _, seconds in measured)

    def timed(self, encode: Callable[[list[Any]], Any], device: torch.device, into: list[_Encoding]) -> Any:
        """Wraps `encode` so that each run of it is appended to `into`.

        Args:
            encode: the model's method that turns items into embeddings. The wrapper keeps its name and its `__self__`,
                which SGLang reads.
            device: where it runs.
            into: receives an _Encoding for each run.
        """

        @functools.wraps(encode)
        def timed(items: list[Any]) -> Any:
            with self.guarded():
                start = _mark(device)
            result = encode(items)
            with self.guarded():
                span = _Span(start, _mark(device))
                into.append(_Encoding(entries_of(items), _bytes_per_token(result), span))
            return result

        timed.__self__ = getattr(encode, "__self__", None)  # type: ignore[attr-defined]
        return timed

    def done(self, encodings: list[_Encoding], requests: list[tuple[int, int, list[Any]]]) -> None:
        """Called when a batch has its embeddings: counts what was encoded again.

        Args:
            encodings: the encoder's runs for this batch.
            requests: for each request the tokens before its chunk, the tokens of its chunk, and its items.
        """
        from sglang.srt.managers.mm_schedule import embedding_cache as cache

        self._runs.extend(encoding.span for encoding in encodings)
        if cache is None:
            return
        chunk_of = {id(item): (prefix, length) for prefix, length, items in requests for item in items}
        needed = sum(tokens_of(items) for _, _, items in requests)
        for encoding in encodings:
            tokens_encoded = sum(tokens_of(items) for _, items in encoding.entries)
            for key, items in encoding.entries:
                if cache.has(key):
                    self._refused.pop(key, None)
                    continue
                prefix, length = chunk_of[id(items[0])]
                if key in self._refused and prefix > _first(items):
                    share = tokens_of(items) / tokens_encoded
                    self._times += 1
                    self._unread.append((encoding.span, share))
                    if not self._warned:
                        self._warned = True
                        seconds = share * (encoding.span.seconds(wait=True) or 0.0)
                        self._warn(items, encoding.bytes_per_token, seconds, prefix, length, needed)
                self._remember(key)

    def _remember(self, key: int | None) -> None:
        self._refused[key] = None
        self._refused.move_to_end(key)
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def _warn(
        self, items: list[Any], bytes_per_token: int, seconds: float, prefix: int, length: int, needed: int
    ) -> None:
        """Logs the warning.

        Args:
            seconds: how long the second encoding took.
            prefix, length: tokens before the chunk, and of the chunk.
            needed: tokens that the cache should have room for.
        """
        from sglang.srt.environ import envs

        last, tokens = max(stop for item in items for _, stop in item.offsets), tokens_of(items)
        logger.warning(
            "mminfer: the vision encoder runs again for every prefill chunk: SGLang's embedding cache (%s=%d) could "
            "not keep %s at token %d of a prompt: %d tokens, %.1f MB. Encoding it a second time took %.2f s; %d more "
            "chunk(s) of this prompt do so, too. Set %s=%d, which leaves that much less for the KV cache, or prefill "
            "in larger chunks. Said once; encoded_again counts it, in trace and metrics.",
            ENVIRONMENT,
            envs.SGLANG_VLM_CACHE_SIZE_MB.get(),
            named(items),
            _first(items),
            tokens,
            tokens * bytes_per_token / MB,
            seconds,
            math.ceil(max(0, last + 1 - prefix - length) / max(1, length)),
            ENVIRONMENT,
            suggested_mb(needed * bytes_per_token),
        )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Logs a defect of ours once and ends the watch; the request goes on."""
        try:
            yield
        except Exception:
            if self.active:
                logger.exception("mminfer: watching the vision encoder failed; what it does twice is not counted")
            self.active = False


def named(items: Sequence[Any]) -> str:
    """The items in words: "one video", "3 items (image, video)"."""
    kinds = sorted({item.modality.name.lower() for item in items})
    return f"one {kinds[0]}" if len(items) == 1 else f"{len(items)} items ({', '.join(kinds)})"


def _first(items: Sequence[Any]) -> int:
    """The position of the items' first token."""
    return min(start for item in items for start, _ in item.offsets)


def _mark(device: torch.device) -> Any:
    """This moment: the host's clock in seconds, or an event in the GPU's stream, which the host does not wait for."""
    if device.type == "cpu":
        return time.perf_counter()
    import torch

    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event


def _bytes_per_token(result: Any) -> int:
    """Bytes of one token's embedding in what an encoder returns.

    The encoder returns one tensor, a list with one tensor for each item, or SGLang's result of pruned frames.
    """
    embedding = result[0] if isinstance(result, list) else getattr(result, "embedding", result)
    return embedding.shape[-1] * embedding.element_size()


watch: EncoderWatch | None = None
"""The watch of this process. Our attention backend sets it; without that backend nothing is watched."""


def watch_encoder(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND get_embedding_and_mask, which SGLang calls once for each modality of a batch.

    The arguments are SGLang's own matter and are passed on as they came. If one that the watch needs is not there, the
    watch ends and the call goes on.
    """
    current, encodings = watch, list[_Encoding]()
    if current is None or not current.active:
        return original(*args, **kwargs)
    watched: dict[str, Any] = {}
    with current.guarded():
        watched = _named(original, args, kwargs)
        encode = current.timed(watched["data_embedding_func"], watched["input_ids"].device, encodings)
        if "data_embedding_func" in kwargs:
            kwargs["data_embedding_func"] = encode
        else:
            args = tuple(encode if value is watched["data_embedding_func"] else value for value in args)
    result = original(*args, **kwargs)
    if encodings:
        with current.guarded():
            items, sizes = watched["embedding_items"], watched["items_size"]
            spans = zip(sizes, sizes[1:], watched["prefix_length"], watched["extend_length"])
            current.done(encodings, [(prefix, new, items[a:b]) for a, b, prefix, new in spans])
    return result


def _named(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(original).bind(*args, **kwargs).arguments

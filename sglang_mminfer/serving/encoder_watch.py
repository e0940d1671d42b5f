"""SGLang's cache of vision embeddings, and what it costs where it is too small.

A prompt is prefilled in chunks, and each chunk that has tokens of a video asks for the video's embeddings, all of
them. SGLang keeps them between chunks in a cache of SGLANG_VLM_CACHE_SIZE_MB (100 unless set: 14,600 tokens of a 7B
model in bf16). What does not fit is refused without a word, and the vision encoder runs again on the whole video for
every chunk. `EncoderWatch` sees that happen; `mminfer doctor --video` says it beforehand. SGLang itself stays as it is.
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
MB = 2**20  # as SGLang counts

STEP_MB = 64
"""Suggested sizes are multiples of this: room for an image or two beside a video."""

REMEMBERED = 1024
"""Refused entries that are remembered, the latest ones: their keys, not their embeddings."""


def entries_of(items: Sequence[Any]) -> list[tuple[int | None, list[Any]]]:
    """What SGLang keeps together of items that it encodes together: each entry's key and items.

    An item of one span is an entry of its own. Where any item has several (a video with timestamps between its
    frames), all items of a request and modality are one.
    """
    if all(len(item.offsets) == 1 or item.is_audio() for item in items):
        return [(item.hash, [item]) for item in items]
    from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache

    return [(MultiModalStaticCache.combine_hashes([item.hash for item in items]), list(items))]


def tokens_of(items: Iterable[Any]) -> int:
    """Tokens that stand for these items in their prompts."""
    return sum(stop - start + 1 for item in items for start, stop in item.offsets)


def suggested_mb(needed: int) -> int:
    """A cache size in MB that holds `needed` bytes."""
    return max(1, math.ceil(needed / (STEP_MB * MB))) * STEP_MB


@dataclass(frozen=True)
class EncodedAgain:
    """Entries that were encoded although they had been before, and what that took."""

    times: int = 0
    milliseconds: float = 0.0


@dataclass(frozen=True)
class _Span:
    """A stretch of time, of the host or of a GPU's stream."""

    start: Any
    stop: Any

    def seconds(self, wait: bool = False) -> float | None:
        """None while a GPU is not done with it, unless told to `wait`."""
        if isinstance(self.start, float):
            return self.stop - self.start
        if wait:
            self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3 if wait or self.stop.query() else None


@dataclass(frozen=True)
class _Encoding:
    """One run of the encoder: what it made, and when."""

    entries: list[tuple[int | None, list[Any]]]
    bytes_per_token: int
    span: _Span


class EncoderWatch:
    """Counts what the encoder does twice because the cache refused it, and says so once.

    Only what a chunk finds in its middle is counted: the same picture in two conversations is encoded twice as
    well, but no more often than a server without chunks would.
    """

    def __init__(self) -> None:
        self._refused: OrderedDict[int | None, None] = OrderedDict()
        self._unread: list[tuple[_Span, float]] = []  # and which share of it was for what had been encoded before
        self._times = 0
        self._said = False
        self.active = True

    def take(self) -> EncodedAgain:
        """What was not taken before. The time of work that a GPU has not done yet comes with a later call."""
        if not self._times and not self._unread:
            return EncodedAgain()
        times, self._times = self._times, 0
        known = [(span.seconds(), share) for span, share in self._unread]
        self._unread = [entry for entry, (seconds, _) in zip(self._unread, known) if seconds is None]
        return EncodedAgain(times, 1e3 * sum(seconds * share for seconds, share in known if seconds is not None))

    def timed(self, encode: Callable[[list[Any]], Any], device: torch.device, into: list[_Encoding]) -> Any:
        """`encode`, which also notes in `into` what it makes. SGLang reads the name and owner of the method."""

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
        """A batch has its embeddings.

        Args:
            requests: of each one its tokens before the chunk, those of the chunk, and its items.
        """
        from sglang.srt.managers.mm_schedule import embedding_cache as cache

        if cache is None:
            return
        chunk_of = {id(item): (prefix, length) for prefix, length, items in requests for item in items}
        needed = sum(tokens_of(items) for _, _, items in requests)
        for encoding in encodings:
            encoded = sum(tokens_of(items) for _, items in encoding.entries)
            for key, items in encoding.entries:
                if cache.has(key):
                    self._refused.pop(key, None)
                    continue
                prefix, length = chunk_of[id(items[0])]
                if key in self._refused and prefix > _first(items):
                    share = tokens_of(items) / encoded
                    self._times += 1
                    self._unread.append((encoding.span, share))
                    if not self._said:
                        self._said = True
                        took = share * (encoding.span.seconds(wait=True) or 0.0)
                        self._say(items, encoding.bytes_per_token, took, prefix, length, needed)
                self._remember(key)

    def _remember(self, key: int | None) -> None:
        self._refused[key] = None
        self._refused.move_to_end(key)
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def _say(self, items: list[Any], bytes_per_token: int, took: float, prefix: int, length: int, needed: int) -> None:
        """`took`: seconds. `prefix`, `length`: of the chunk. `needed`: tokens that the cache should have room for."""
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
            took,
            math.ceil(max(0, last + 1 - prefix - length) / max(1, length)),
            ENVIRONMENT,
            suggested_mb(needed * bytes_per_token),
        )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A defect of ours is said once and ends the watch; the request goes on."""
        try:
            yield
        except Exception:
            if self.active:
                logger.exception("mminfer: watching the vision encoder failed; what it does twice is not counted")
            self.active = False


def named(items: Sequence[Any]) -> str:
    """What the items are, in words: "one video", "3 items (image, video)"."""
    kinds = sorted({item.modality.name.lower() for item in items})
    return f"one {kinds[0]}" if len(items) == 1 else f"{len(items)} items ({', '.join(kinds)})"


def _first(items: Sequence[Any]) -> int:
    """Position of the first token."""
    return min(start for item in items for start, _ in item.offsets)


def _mark(device: torch.device) -> Any:
    """This moment: seconds, or an event in the stream of a GPU, which is not waited for."""
    if device.type == "cpu":
        return time.perf_counter()
    import torch

    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event


def _bytes_per_token(result: Any) -> int:
    """Of what an encoder returns: one tensor, one for each item, or SGLang's result of pruned frames."""
    one = result[0] if isinstance(result, list) else getattr(result, "embedding", result)
    return one.shape[-1] * one.element_size()


watch: EncoderWatch | None = None
"""This process's. Set by our attention backend, so that a server without it is not watched."""


def watch_encoder(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND get_embedding_and_mask, which a batch calls once for each modality. Costs nothing if all is cached.

    What it is called with is SGLang's matter and goes through as it came: where a watched argument is not found, the
    watch ends, and the call does not.
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
    answer = original(*args, **kwargs)
    if encodings:
        with current.guarded():
            items, sizes = watched["embedding_items"], watched["items_size"]
            spans = zip(sizes, sizes[1:], watched["prefix_length"], watched["extend_length"])
            current.done(encodings, [(prefix, new, items[a:b]) for a, b, prefix, new in spans])
    return answer


def _named(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(original).bind(*args, **kwargs).arguments

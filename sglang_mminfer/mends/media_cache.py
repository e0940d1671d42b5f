"""Keeps decoded and preprocessed videos, so that a later turn of a conversation does not decode the earlier ones again.

SGLang prepares all media of a prompt anew with every turn, also those whose tokens the radix cache has, and its own
cache of preprocessed pictures is not asked if a request has a video. What is kept here is found by content: by the
hash of a file and what was taken of it, or by the hash of frames and what was made of them. So a file that has changed
is another one, and other settings make another entry.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_mminfer import settings

if TYPE_CHECKING:
    import torch

ORIGIN = "mminfer_origin"
"""Attribute of SGLang's decoder of a file: the file's `Origin`."""

FRAMES, FEATURES = "frames", "features"
"""What is kept: decoded frames, in the size in which they are used; and what a processor makes of frames."""

Tensors = tuple["torch.Tensor", ...]
Key = tuple[Hashable, ...]
"""FRAMES or FEATURES, and everything that decides what the tensors hold."""

MOST_BYTES = 16 << 30
"""Larger files are not hashed."""

_HEAD = 4096
_PART = 1 << 20


@dataclass(frozen=True)
class Origin:
    """The content of a file that a decoder is about to open.

    Attributes:
        digest: 32 bytes, SHA-256 of all of it.
        path: where the file lies; None if its bytes came with the request.
    """

    digest: bytes
    path: str | None

    def unchanged(self) -> bool:
        """Whether the file still has this content. One that was written while it was decoded is not kept."""
        return self.path is None or origin_of(self.path) == self


def origin_of(source: Any) -> Origin | None:
    """The content of a file, given as its path or its bytes; None if it may not be all that a decoder reads.

    A text may be a playlist, which names other files. FFmpeg takes a name with % for the pattern of many names. A
    device or a pipe may never end, and a file above `MOST_BYTES` takes too long.
    """
    if isinstance(source, bytes):
        return Origin(hashlib.sha256(source).digest(), None) if _is_binary(source[:_HEAD]) else None
    if not isinstance(source, str) or "%" in source:
        return None
    digest = hashlib.sha256()
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return None
        with open(source, "rb") as file:
            part = file.read(_PART)
            if not _is_binary(part[:_HEAD]):
                return None
            while part:
                digest.update(part)
                part = file.read(_PART)
    except (OSError, ValueError):
        return None  # the decoder says what is wrong
    return Origin(digest.digest(), source)


def _is_binary(head: bytes) -> bool:
    return 0 in head


def content_of(tensor: torch.Tensor) -> Key:
    """A tensor's content, as a part of a key: hash, shape and dtype."""
    import torch

    data = tensor.detach().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.data).digest(), tuple(tensor.shape), str(tensor.dtype)


class Report(msgspec.Struct, kw_only=True):
    """What the cache has done since the server started, and what it holds.

    Attributes:
        hits, misses: how often frames or features were there, and how often they had to be made.
        entries, bytes: what is kept now.
        limit: bytes that may be kept.
    """

    hits: int
    misses: int
    entries: int
    bytes: int
    limit: int


@dataclass(frozen=True)
class _Kept:
    """Tensors on the CPU, and the devices on which they were made."""

    tensors: Tensors
    devices: tuple[torch.device, ...]

    @property
    def bytes(self) -> int:
        return _bytes(self.tensors)

    def shared(self) -> Tensors:
        return tuple(tensor.to(device) for tensor, device in zip(self.tensors, self.devices, strict=True))


@dataclass
class _Making:
    """What a thread is making. Others that want the same wait for `done`."""

    done: threading.Event = field(default_factory=threading.Event)
    made: _Kept | None = None


class MediaCache:
    """Tensors by content, up to `limit` bytes; the ones that were not used for the longest time go first.

    Features go before frames: they are larger, and are made of frames in less time than frames of a file. Any thread
    may call. What callers get is shared: a caller that changes it, or hands it on, makes a copy.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Kept] = OrderedDict()
        self._making: dict[Key, _Making] = {}
        self._bytes = self._hits = self._misses = self._cleared = 0

    def get(self, key: Key, make: Callable[[], Tensors], valid: Callable[[], bool] = lambda: True) -> Tensors:
        """The tensors of a key, from the cache or from `make`. Threads that want the same at once wait for one of them.

        Args:
            key: what decides their content; it begins with FRAMES or FEATURES.
            make: makes them. An error is not kept, nor is what exceeds the limit: each waiting thread makes its own.
            valid: called after `make`: whether what was made belongs to the key.
        """
        while True:
            with self._lock:
                if (kept := self._entries.get(key)) is not None:
                    self._entries.move_to_end(key)
                    self._hits += 1
                    break
                if (other := self._making.get(key)) is None:
                    self._misses += 1
                    mine, cleared = self._making.setdefault(key, _Making()), self._cleared
                    break
            other.done.wait()
            if (kept := other.made) is not None:
                with self._lock:
                    self._hits += 1
                break
        if kept is not None:
            return kept.shared()
        try:
            made = make()
            if _bytes(made) <= self.limit and valid():
                # A copy, because pinned memory, and memory of a GPU, is not for keeping.
                tensors = tuple(tensor.detach().to("cpu", copy=True).contiguous() for tensor in made)
                mine.made = _Kept(tensors, tuple(tensor.device for tensor in made))
                self._keep(key, mine.made, cleared)
        finally:
            with self._lock:
                del self._making[key]
            mine.done.set()
        return made

    def _keep(self, key: Key, new: _Kept, cleared: int) -> None:
        with self._lock:
            if cleared != self._cleared:
                return
            while self._bytes + new.bytes > self.limit:
                features = (other for other in self._entries if other[0] == FEATURES)
                oldest = next(features, None if key[0] == FEATURES else next(iter(self._entries)))
                if oldest is None:
                    return
                self._bytes -= self._entries.pop(oldest).bytes
            self._entries[key] = new
            self._bytes += new.bytes

    def clear(self) -> None:
        """Forgets everything, also what is being made at the moment."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0
            self._cleared += 1

    def report(self) -> Report:
        """What the cache has done, and what it holds."""
        with self._lock:
            return Report(
                hits=self._hits,
                misses=self._misses,
                entries=len(self._entries),
                bytes=self._bytes,
                limit=self.limit,
            )


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@functools.cache
def of_process() -> MediaCache:
    """This process's cache."""
    return MediaCache(settings.media_cache_bytes())


def enabled() -> bool:
    """Whether this process keeps anything."""
    return of_process().limit > 0

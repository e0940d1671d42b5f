"""What older releases of SGLang have under another name, or not at all.

Each function asks SGLang for the thing and never for its version, so that a patched SGLang gets what fits it. A hook
whose place has moved says so itself, in `Hook.formerly`.
"""

from __future__ import annotations

import itertools
from typing import Any


def pad_mm_tokens(input_ids: Any, mm_inputs: Any) -> Any:
    """`mm_utils.pad_mm_tokens`. Up to 0.5.22 it is a method of a class, and in 0.5.20 it returns a list."""
    from sglang.srt.managers import mm_utils

    if hasattr(mm_utils, "pad_mm_tokens"):
        return mm_utils.pad_mm_tokens(input_ids, mm_inputs)
    return mm_utils.MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(input_ids, mm_inputs)


def pad_values(item: Any) -> tuple[int, ...]:
    """The numbers that stand for a medium's tokens, in turn; () if it has none yet. Up to 0.5.22 it is one number."""
    values = getattr(item, "pad_values", None) or (item.pad_value,)
    return tuple(value for value in values if value is not None)


def padding(item: Any, length: int) -> list[int]:
    """The numbers that stand for the first `length` tokens of a medium, which has at least one."""
    return list(itertools.islice(itertools.cycle(pad_values(item)), length))


def kv_write_loc(forward_batch: Any, layer: Any) -> Any:
    """`KVWriteLoc.for_layer`, for a layer of self-attention. Up to 0.5.21 a place to write at has no marks to carry."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if hasattr(KVWriteLoc, "for_layer"):
        return KVWriteLoc.for_layer(forward_batch, layer)
    return KVWriteLoc(forward_batch.out_cache_loc)


def platform_capabilities() -> Any:
    """`PlatformCapabilities` without any. Up to 0.5.21 a platform has none to tell: None."""
    from sglang.srt.platforms import interface

    return interface.PlatformCapabilities() if hasattr(interface, "PlatformCapabilities") else None


def allocates_pages_anywhere() -> bool:
    """Whether SGLang allocates pages of more than one token without Triton. 0.5.21 and 0.5.20 cannot."""
    return platform_capabilities() is not None


def platform_pools() -> type:
    """A base for an out-of-tree platform. Up to 0.5.21 the platform names the classes of pool and allocator."""
    return _NoPools if allocates_pages_anywhere() else _Pools


class _NoPools:
    pass


class _Pools:
    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> Any:
        """The allocator of pages is in Triton there, so this is the one of single tokens."""
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        def allocator(size: int, *, page_size: int, **fields: Any) -> Any:
            if page_size != 1:
                raise NotImplementedError(f"mminfer: a CPU has pages of one token with this SGLang, not of {page_size}")
            return TokenToKVPoolAllocator(size, **fields)

        return allocator


def shards_kv_cache(cfg: Any) -> bool:
    """`enable_kv_cache_sharding` of a view of ServerArgs. 0.5.21 and 0.5.20 cannot do that."""
    return getattr(cfg, "enable_kv_cache_sharding", False)


def dp_ranks() -> int:
    """`num_dp_ranks`: how many schedulers a request may go to. Up to 0.5.21 it is called dp_size."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return parallel.num_dp_ranks if hasattr(parallel, "num_dp_ranks") else parallel.dp_size

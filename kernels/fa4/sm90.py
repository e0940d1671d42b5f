"""FlashAttention-4's SM90 forward, reading K, V and the lists of key tiles where they lie.

Upstream, a kernel with block lists wants K and V in one piece, because it loads them by TMA, and a row of padded
indices for each query tile. Two things differ here, and nothing of upstream's code is repeated:

    paged   K and V are loaded through a page table whose pages hold one key. The class has a loader for small pages
            (`PagedKVManager`), which fills the same pipelines; only the two functions differ that `load` passes to
            `produce_block_sparse_loads`.
    lists   A list is a range of one array, the plan's own. Only `get_curr_blocksparse_tensors` knows how lists lie.

So these are upstream's functions with one or two of the names that they use bound anew, and a fence.
"""

from __future__ import annotations

from functools import partial
from inspect import unwrap
from types import FunctionType
from typing import Any

import cutlass.cute as cute
from cutlass import Constexpr, Int32
from flash_attn.cute import block_sparse_utils
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.paged_kv import PagedKVManager
from flash_attn.cute.pipeline import PipelineCpAsync


def rebound(staged: Any, **names: Any) -> Any:
    """A staged function again, with some of its global names bound to other things."""
    function = unwrap(staged)
    assert all(name in function.__globals__ for name in names), names
    bound = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    return cute.jit(bound)


@cute.jit
def lists_of_item(
    batch: Int32,
    head: Int32,
    m_block: Int32,
    lists: BlockSparseTensors,
    seqlen: Any,
    kv_subtile_factor: Constexpr[int] = 1,
) -> Any:
    """The masked and the full key tiles of one item: a count and where they begin, twice.

    lists: `mask_block_cnt` int32 [kv_heads, items, 3] has for each item the beginning of its key tiles in
    `mask_block_idx` int32 [visits], how many are full, and how many masked ones follow.
    """
    items, tiles = lists.mask_block_cnt, lists.mask_block_idx
    first, full, masked = items[head, m_block, 0], items[head, m_block, 1], items[head, m_block, 2]
    return masked, cute.domain_offset(first + full, tiles), full, cute.domain_offset(first, tiles)


PRODUCE = rebound(block_sparse_utils.produce_block_sparse_loads, get_curr_blocksparse_tensors=lists_of_item)
CONSUME = rebound(block_sparse_utils.consume_block_sparse_loads, get_curr_blocksparse_tensors=lists_of_item)
MMA = rebound(FlashAttentionForwardSm90.mma, consume_block_sparse_loads=CONSUME)


class FencedPipelineCpAsync(PipelineCpAsync):
    """Tiles that cp.async has written, for a consumer that multiplies them by wgmma.

    The two reach shared memory through different proxies, and PTX wants a fence between them. Upstream has none.
    """

    def consumer_wait(self, *arguments: Any, **keywords: Any) -> None:
        super().consumer_wait(*arguments, **keywords)
        cute.arch.fence_view_async_shared()


def fenced(pipeline: PipelineCpAsync) -> PipelineCpAsync:
    """The pipeline as a `FencedPipelineCpAsync`, in the way in which upstream makes its own of others' pipelines."""
    object.__setattr__(pipeline, "__class__", FencedPipelineCpAsync)
    return pipeline


class ListedForwardSm90(FlashAttentionForwardSm90):
    """The forward over lists as `lists_of_item` finds them.

    If it is made with `paged_kv_non_tma`, K and V are [slots, 1, kv_heads, D], with a page table int32 [1, keys] of
    slots; else [1, keys, kv_heads, D].
    """

    # `load` and `mma` are plain methods, of which nothing is staged. Their arguments are upstream's.
    def mma(self, *arguments: Any) -> None:
        """Upstream's consumer, over our lists."""
        arguments = tuple(fenced(x) if isinstance(x, PipelineCpAsync) else x for x in arguments)
        MMA(self, *arguments)

    def load(
        self,
        mQ: Any,
        mK: Any,
        mV: Any,
        sQ: Any,
        sK: Any,
        sV: Any,
        tma_atom_Q: Any,
        tma_atom_K: Any,
        tma_atom_V: Any,
        pipeline_k: Any,
        pipeline_v: Any,
        pipeline_q: Any,
        gmem_tiled_copy_Q: Any,
        mPageTable: Any,
        *others: Any,
    ) -> None:
        """Upstream's producer. If K and V are paged, what the lists name is loaded through the page table."""

        def produce(lists: Any, batch: Any, head: Any, m_block: Any, seqlen: Any, state: Any, *rest: Any) -> Any:
            if self.use_tma_KV:
                return PRODUCE(lists, batch, head, m_block, seqlen, state, *rest)
            thread, _, _ = cute.arch.thread_idx()
            pages = PagedKVManager.create(
                mPageTable,
                mK,
                mV,
                cute.FastDivmodDivisorV2(mK.shape[0]),
                batch,
                head,
                thread,
                seqlen.seqlen_k,
                0,
                self.tile_n,
                self.tile_hdim,
                self.tile_hdimv,
                self.num_threads_per_warp_group,
                mK.element_type,
                arch=90,
            )
            load_k = partial(self.load_tile, pages, sK, pipeline_kv=pipeline_k, K_or_V="K")
            load_v = partial(self.load_tile, pages, sV, pipeline_kv=pipeline_v, K_or_V="V")
            _, _, *after = rest
            return PRODUCE(lists, batch, head, m_block, seqlen, state, load_k, load_v, *after)

        # fmt: off
        rebound(FlashAttentionForwardSm90.load, produce_block_sparse_loads=produce)(
            self, mQ, mK, mV, sQ, sK, sV, tma_atom_Q, tma_atom_K, tma_atom_V, pipeline_k, pipeline_v, pipeline_q,
            gmem_tiled_copy_Q, mPageTable, *others,
        )
        # fmt: on

    @cute.jit
    def load_tile(
        self, pages: PagedKVManager, sX: cute.Tensor, src_idx: Int32, pipeline_kv: Any, producer_state: Any, K_or_V: str
    ) -> None:
        """Key tile `src_idx` of the page table, into the stage of the pipeline that `producer_state` names."""
        pages.load_page_table(src_idx)
        self.load_KV(None, pages, sX, src_idx, pipeline_kv, producer_state, K_or_V)

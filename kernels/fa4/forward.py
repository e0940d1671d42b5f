"""FlashAttention-4's forward as one compiled function for each kind of call.

The functions are compiled and called as `flash_attn.cute.interface._flash_attn_fwd` does it. That takes a quarter of a
millisecond of Python for each call, to find out again what does not change. FlashAttention-4's own cache keeps them on
disk, so a server compiles on its first start only.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32
from flash_attn.cute import cache_utils
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100
from flash_attn.cute.utils import AuxData
from quack.compile_utils import make_fake_tensor

from . import why_unsupported
from .arguments import CallArguments
from .mask import below_bound
from .sm90 import ListedForwardSm90

logger = logging.getLogger(__name__)

DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
ROWS = 128  # of one matrix product


@dataclass(frozen=True)
class Kind:
    """One kind of call.

    capability: compute capability of the GPU, 90 for 9.0.
    block_k:    keys of a key tile.
    gathered:   K and V are copies of the visited key tiles; else they are the cache.
    """

    capability: int
    dtype: torch.dtype
    head_dim: int
    block_k: int
    gathered: bool

    def __post_init__(self) -> None:
        if (why := why_unsupported(self.head_dim, self.block_k)) is not None:
            raise ValueError(f"the fa4 executor cannot run this plan: {why}")
        if self.blackwell and not self.gathered:
            raise ValueError("gathered: expected True on Blackwell, whose kernel reads no pages through a list")

    @property
    def blackwell(self) -> bool:
        return self.capability >= 100

    @property
    def pairs(self) -> int:
        """Rows of the kernel's query tile: Blackwell's kernel works at two matrix products by turns."""
        return 2 * ROWS if self.blackwell and self.head_dim <= 128 else ROWS


@cache
def compiled(kind: Kind) -> Callable[..., None]:
    """The function, from memory, from disk, or compiled in 5 to 30 seconds."""
    kept = _kept()
    key = (_own_sources(), str(kind))
    if key not in kept:
        logger.info("mminfer: compiling flash-attn-4 for %s", kind)
        kept[key] = compile_kind(kind)
    return kept[key]


def compile_kind(kind: Kind) -> Callable[..., None]:
    """Compile for the GPU of this machine, or for the one that the variable CUTE_DSL_ARCH names."""
    return cute.compile(_kernel(kind), *_fake_arguments(kind), options="--enable-tvm-ffi")


def call(
    kind: Kind,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arguments: CallArguments,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """One launch.

    Args:
        q, out: [kv_heads, rows, D] for the rows of `arguments`. lse: float32 [kv_heads, rows], natural logarithm.
        k, v: [1, keys, kv_heads, D] if gathered, else [slots, 1, kv_heads, D].
    """
    q, out = (x.transpose(0, 1)[None] for x in (q, out))  # upstream's [batch, rows, heads, D]
    pages = None if kind.gathered else arguments.kv_slots[None]
    lists = arguments.padded_lists if kind.blackwell else (arguments.lists, arguments.tiles, None, None)
    aux_tensors = [arguments.q_stop, arguments.kv_pos]
    compiled(kind)(*_in_order(kind, q, k, v, out, lse[None], sm_scale, pages, (*lists, *[None] * 4), aux_tensors))


def _in_order(
    kind: Kind, q: Any, k: Any, v: Any, out: Any, lse: Any, sm_scale: float, pages: Any, lists: Any, aux_tensors: Any
) -> list[Any]:
    """The arguments of upstream's `__call__`; those that are None here are of other uses."""
    first = [q, k, v, out, lse, sm_scale, None, None, None, None, pages, None, None, None]
    scales, tail = ([None], [None] * 8) if kind.blackwell else ([], [None] * 2)
    return [*first, *scales, lists, AuxData(aux_tensors, None), *tail]


def _kernel(kind: Kind) -> Any:
    if kind.blackwell:
        return FlashAttentionForwardSm100(
            kind.head_dim,
            kind.head_dim,
            m_block_size=ROWS,
            n_block_size=kind.block_k,
            q_stage=kind.pairs // ROWS,
            is_static_persistent=False,  # items differ in length: a multiprocessor that is free takes the next one
            mask_mod=below_bound,
            has_aux_tensors=True,
        )
    return ListedForwardSm90(
        DTYPES[kind.dtype],
        kind.head_dim,
        kind.head_dim,
        qhead_per_kvhead=1,
        is_causal=False,
        is_local=False,
        pack_gqa=False,
        tile_m=ROWS,
        tile_n=kind.block_k,
        num_stages=2,
        num_threads=3 * ROWS,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=kind.head_dim != 96,  # as upstream sets it
        mask_mod=below_bound,
        has_aux_tensors=True,
        paged_kv_non_tma=not kind.gathered,
    )


def _fake_arguments(kind: Kind) -> list[Any]:
    """Arguments of any sizes. Rows of q, K, V and out begin at multiples of 16 bytes."""
    size, dtype = cute.sym_int, DTYPES[kind.dtype]
    batch, rows, keys, heads, dims, items = size(), size(), size(), size(), size(), size()

    def numbers(*shape: Any) -> Any:
        return make_fake_tensor(Int32, shape, divisibility=1)

    q, out = (make_fake_tensor(dtype, (batch, rows, heads, dims), divisibility=8) for _ in range(2))
    kv_shape = (batch, keys, heads, dims) if kind.gathered else (size(), size(), heads, dims)
    k, v = (make_fake_tensor(dtype, kv_shape, divisibility=8) for _ in range(2))
    lse = make_fake_tensor(Float32, (batch, heads, rows), divisibility=1)
    pages = None if kind.gathered else numbers(batch, keys)
    if kind.blackwell:
        each = [(numbers(batch, heads, items), numbers(batch, heads, items, size())) for _ in range(2)]
        lists = BlockSparseTensors(*each[0], *each[1])
    else:
        lists = BlockSparseTensors(numbers(heads, items, size()), numbers(size()))
    arguments = _in_order(kind, q, k, v, out, lse, 1.0, pages, lists, [numbers(heads, rows), numbers(keys)])
    return [*arguments, cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)]


@cache
def _kept() -> Any:
    """FlashAttention-4's cache of compiled functions: on disk, or in memory if no folder can be written."""
    folder = cache_utils.CUTE_DSL_CACHE_DIR or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        # Under the name of all sources of FlashAttention-4 and the versions of its compiler, as upstream does.
        path = Path(folder) / "flash_attention_cute_dsl" / cache_utils._compute_source_fingerprint() / "sglang_mminfer"
        kept = cache_utils.JITPersistentCache(path)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"no file can be written in {path}")
        return kept
    except OSError as error:
        logger.warning("mminfer: compiled kernels of flash-attn-4 are not kept: %s", error)
        return cache_utils.JITCache()


def _own_sources() -> str:
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("forward.py", "mask.py", "sm90.py")]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()

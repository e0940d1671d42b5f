"""What our kernel is measured against, each on the same inputs and where possible on the same tiles."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from sglang_mminfer.benchmarks.inputs import Inputs
from sglang_mminfer.benchmarks.measure import visits
from sglang_mminfer.kernels.block_plan import BlockPlan, PrefillPlan
from sglang_mminfer.kernels.torch_gather import LOG2_E, merge_state

# Installed or not, by the module that would be imported.
OPTIONAL = {"flashinfer": "flashinfer", "flash_attention_3": "flash_attn_interface"}
MOST_ELEMENTS = 1 << 31  # of a tensor that is handed to cuDNN: beyond, one KV head at a time

Part = tuple[torch.Tensor, torch.Tensor]  # o [1, Hq, rows, D] and the natural logarithm of the sum [1, Hq, rows]
Attend = Callable[..., Part]


class NotApplicable(Exception):
    """A baseline cannot express the case; the text says why."""


def installed() -> dict[str, str]:
    """Each optional baseline: "installed" or "not installed"."""
    found = {name: importlib.util.find_spec(module) is not None for name, module in OPTIONAL.items()}
    answer = {name: "installed" if there else "not installed" for name, there in found.items()}
    answer["cudnn_block_sparse"] = "not compared: " + (
        "cuDNN's front end is installed, but there is no adapter for it here"
        if importlib.util.find_spec("cudnn") is not None
        else "not installed"
    )
    return answer


# ---- dense ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Exact causal attention of the last rows of a prompt.

    A whole prompt is one causal call. A chunk is two: all its rows over the prefix without a mask, and over its
    own keys with a causal one; together they compute each (row, key) pair at or below the diagonal once. `run` is
    what is timed; the join of the two parts, which a kernel with a bottom-right mask does not need, is not.
    """

    how: str
    calls: tuple[Callable[[], Part], ...]  # of whole heads: the prefix's, then its own
    heads_apart: int  # the calls of so many KV heads follow each other

    def run(self) -> list[Part]:
        return [call() for call in self.calls]

    def joined(self, parts: list[Part]) -> torch.Tensor:
        """[rows, Hq, D], from what `run` returned."""
        per_head = len(parts) // self.heads_apart
        whole = []
        for first in range(0, len(parts), per_head):
            o, lse = parts[first]
            if per_head == 2:
                own, its_lse = parts[first + 1]
                o = merge_state(o, lse * LOG2_E, own, its_lse * LOG2_E)[0].to(own.dtype)
            whole.append(o)
        o = torch.cat(whole, dim=1) if len(whole) > 1 else whole[0]
        return o[0].transpose(0, 1)


def dense(inputs: Inputs) -> Dense:
    """Keys and values are read in the order of the prompt, with no page table: in dense's favour."""
    how, attend = _dense_kernel(inputs.q.device.type, inputs.q.dtype, inputs.q.shape[2])
    rows, tokens = len(inputs.q), len(inputs.keys)
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.keys, inputs.values))
    groups = [(q, k, v)]
    if inputs.q.numel() >= MOST_ELEMENTS:
        how += ", one KV head at a time because cuDNN takes no larger tensors"
        group = q.shape[1] // k.shape[1]
        groups = [
            (q[:, i * group : (i + 1) * group].contiguous(), k[:, i : i + 1].contiguous(), v[:, i : i + 1].contiguous())
            for i in range(k.shape[1])
        ]
    parts = []
    split = tokens - rows
    for q, k, v in groups:
        if split:
            parts.append(partial(attend, q, k[:, :, :split], v[:, :, :split], False, inputs.scale))
        parts.append(partial(attend, q, k[:, :, split:], v[:, :, split:], True, inputs.scale))
    if split:
        how += ", prefix and own keys apart"
    return Dense(how, tuple(parts), len(groups))


@cache
def _dense_kernel(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend]:
    """The fastest that works here: cuDNN with grouped heads, cuDNN with KV heads repeated, FlashAttention-2."""
    if device == "cpu":
        return "torch's CPU flash attention", partial(_repeated, _cpu)
    tried = []
    candidates: list[tuple[str, Attend]] = [
        ("cuDNN SDPA", _cudnn),
        ("cuDNN SDPA on repeated KV heads", partial(_repeated, _cudnn)),
        ("FlashAttention-2 (not FA3-class) on repeated KV heads", partial(_repeated, _flash_2)),
    ]
    for name, attend in candidates:
        try:
            if (difference := _probe(attend, dtype, head_dim)) < 0.05:
                return name, attend
            tried.append(f"{name}: differs by {difference:.3f}")
        except RuntimeError as error:
            tried.append(f"{name}: {str(error).splitlines()[0]}")
    raise NotApplicable("; ".join(tried))


def _probe(attend: Attend, dtype: torch.dtype, head_dim: int) -> float:
    """Largest difference from plain softmax attention, of the output and of the LSE, grouped heads, causal."""
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 256, head_dim, generator=random, device="cuda").to(dtype) for h in (4, 2, 2))
    scale = head_dim**-0.5
    out, lse = attend(q, k, v, True, scale)
    wide_q, wide_k, wide_v = q.float(), *(x.float().repeat_interleave(2, dim=1) for x in (k, v))
    future = torch.ones(256, 256, dtype=torch.bool, device="cuda").triu(1)
    scores = (wide_q @ wide_k.transpose(2, 3) * scale).masked_fill(future, -torch.inf)
    difference = (out.float() - scores.softmax(dim=-1) @ wide_v).abs().max()
    return float(torch.maximum(difference, (lse - scores.logsumexp(dim=-1)).abs().max()))


# Each: q [1, Hq, m, D], k and v [1, Hkv, n, D] -> a Part.


def _cudnn(q, k, v, causal: bool, scale: float) -> Part:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return found[0], found[1].reshape(q.shape[:3])


def _flash_2(q, k, v, causal: bool, scale: float) -> Part:
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _cpu(q, k, v, causal: bool, scale: float) -> Part:
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return found[0], found[1]


def _repeated(attend: Attend, q, k, v, causal: bool, scale: float) -> Part:
    group = q.shape[1] // k.shape[1]
    return attend(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), causal, scale)


def flash_attention_3(inputs: Inputs, plan: PrefillPlan) -> Callable[[], Any]:
    """Dense: one call, bottom-right causal."""
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

    q, k, v = inputs.q[None], inputs.keys[None], inputs.values[None]
    return lambda: flash_attn_func(q, k, v, softmax_scale=inputs.scale, causal=True)


# ---- sparse, on our tiles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """The rows and keys of a plan's only pass in the order of its tiles, for kernels that know no page table.

    q [Hq, T * block_q, D], the rows of a tile padded with zeros; k, v [Hkv, key tiles * block_k, D];
    q_stop int32 [T * block_q], 0 for padding; rows int64 [T * block_q], of q, -1 for padding.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_stop: torch.Tensor
    rows: torch.Tensor


def only_pass(plan: PrefillPlan) -> BlockPlan:
    """The plan's pass, if there is one, for all heads, and no key of it is hidden.

    Raises:
        NotApplicable: otherwise.
    """
    if len(plan.passes) != 1:
        raise NotApplicable(f"the plan has {len(plan.passes)} passes")
    (block_plan,) = plan.passes
    if block_plan.head_groups != (tuple(range(plan.num_heads)),):
        raise NotApplicable("the heads have lists of their own")
    if int(block_plan.num_picked.sum()):
        raise NotApplicable("some keys of its tiles are hidden, lane by lane")
    return block_plan


def gathered(inputs: Inputs, plan: BlockPlan) -> Gathered:
    sizes = plan.q_indptr.diff().long()
    lane = torch.arange(plan.block_q, device=sizes.device)
    there = (lane < sizes[:, None]).flatten()
    number = (plan.q_indptr[:-1].long()[:, None] + lane).flatten()[there]
    rows = torch.full_like(there, -1, dtype=torch.int64)
    rows[there] = plan.q_rows[number].long()
    q_stop = torch.zeros_like(rows, dtype=torch.int32)
    q_stop[there] = plan.q_stop[number]
    q = inputs.q[rows.clamp_min(0)].masked_fill(~there[:, None, None], 0)
    slots = plan.keys.kv_slots.long()
    k, v = inputs.k_cache[slots], inputs.v_cache[slots]
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return Gathered(q, k, v, q_stop, rows)


@dataclass(frozen=True)
class Flex:
    """FlexAttention on the tiles of a plan, over gathered q, k and v; gathering them is not timed."""

    gathered: Gathered
    block_mask: Any
    run: Callable[[], torch.Tensor]

    def output(self, like: torch.Tensor) -> torch.Tensor:
        """[rows, Hq, D], in the order of q."""
        out = torch.zeros_like(like)
        real = self.gathered.rows >= 0
        out[self.gathered.rows[real]] = self.run()[0].transpose(0, 1)[real]
        return out


def flex_attention(inputs: Inputs, plan: PrefillPlan) -> Flex:
    """Full tiles go without a mask and partial ones by position, as in our kernel."""
    from torch.nn.attention import flex_attention as flex

    block_plan = only_pass(plan)
    own = gathered(inputs, block_plan)
    q_stop, kv_pos = own.q_stop, block_plan.keys.kv_pos

    def visible(batch, head, q_index, kv_index):
        return kv_pos[kv_index] < q_stop[q_index]

    tile, block, kind = visits(block_plan)
    lists = [_lists(tile[kind == k], block[kind == k], block_plan, len(kv_pos)) for k in (1, 0)]
    block_mask = flex.BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=(block_plan.block_q, block_plan.block_k), mask_mod=visible,
        seq_lengths=(len(q_stop), len(kv_pos)),
    )  # fmt: skip
    q, k, v = (x[None] for x in (own.q, own.k, own.v))
    on_card = inputs.q.is_cuda
    attend = torch.compile(flex.flex_attention, dynamic=False) if on_card else flex.flex_attention
    return Flex(own, block_mask, lambda: attend(q, k, v, block_mask=block_mask, scale=inputs.scale, enable_gqa=True))


def _lists(tile: torch.Tensor, block: torch.Tensor, plan: BlockPlan, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [1, 1, T] and [1, 1, T, key tiles]: how many key tiles each query tile visits, and which."""
    counts = torch.bincount(tile, minlength=plan.num_tiles)
    number = torch.arange(len(tile), device=tile.device) - (counts.cumsum(0) - counts)[tile]
    indices = torch.zeros(plan.num_tiles, keys // plan.block_k, dtype=torch.int32, device=tile.device)
    indices[tile, number] = block.to(torch.int32)
    return counts.to(torch.int32)[None, None], indices[None, None]


def flashinfer(inputs: Inputs, plan: PrefillPlan) -> Callable[[], Any]:
    """VariableBlockSparseAttentionWrapper on gathered q, k and v. It has no mask inside a tile, so that partial
    tiles count whole: the same work, but another answer along the diagonal."""
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    block_plan = only_pass(plan)
    own = gathered(inputs, block_plan)
    real = own.rows >= 0
    device, kv_heads = inputs.q.device, own.k.shape[0]
    key_tiles = len(block_plan.keys.kv_pos) // block_plan.block_k
    mask = torch.zeros(block_plan.num_tiles, key_tiles, dtype=torch.bool, device=device)
    tile, block, _ = visits(block_plan)
    mask[tile, block] = True
    key_sizes = torch.full((kv_heads, key_tiles), block_plan.block_k, dtype=torch.int32, device=device)
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=device))
    wrapper.plan(
        mask.expand(kv_heads, -1, -1).contiguous(),
        block_plan.q_indptr.diff().to(torch.int32).expand(kv_heads, -1).contiguous(),
        key_sizes,
        own.q.shape[0],
        kv_heads,
        own.q.shape[2],
        q_data_type=inputs.q.dtype,
        sm_scale=inputs.scale,
    )
    q = own.q[:, real].contiguous()
    return lambda: wrapper.run(q, own.k, own.v)


# By the name in `Case.against`: makes what is timed.
AGAINST: dict[str, Callable[[Inputs, PrefillPlan], Callable[[], Any]]] = {
    "flex_attention": lambda inputs, plan: flex_attention(inputs, plan).run,
    "flashinfer": flashinfer,
    "flash_attention_3": flash_attention_3,
}

"""The kernels that ours is measured against, on the same inputs and, where possible, on the same tiles."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from sglang_mminfer.benchmarks.inputs import Inputs
from sglang_mminfer.benchmarks.measure import visits
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.torch_gather import LOG2_E, merge_state

# Optional baselines and the module that each needs.
OPTIONAL = {"flashinfer": "flashinfer", "flash_attention_3": "flash_attn_interface"}
MOST_ELEMENTS = 1 << 31  # cuDNN takes no larger tensors: beyond this, it gets one KV head at a time

Part = tuple[torch.Tensor, torch.Tensor]  # o [1, Hq, rows, D] and lse [1, Hq, rows], base e
Attend = Callable[..., Part]


class NotApplicable(Exception):
    """A baseline cannot run the case; the message says why."""


def installed() -> dict[str, str]:
    """Each optional baseline by name: "installed", "not installed", or why it is not compared."""
    available = {name: importlib.util.find_spec(module) is not None for name, module in OPTIONAL.items()}
    states = {name: "installed" if is_there else "not installed" for name, is_there in available.items()}
    states["cudnn_block_sparse"] = "not compared: " + (
        "cuDNN's front end is installed, but there is no adapter for it here"
        if importlib.util.find_spec("cudnn") is not None
        else "not installed"
    )
    return states


# ---- dense ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Exact causal attention of the last rows of a prompt.

    A whole prompt is one causal call. A chunk is two calls: its rows over the prefix without a mask, and its rows over
    their own keys with a causal mask. Together they compute each (row, key) pair at or below the diagonal once. Only
    `run` is timed: neither the join of the two parts, which a kernel with a bottom-right mask does not need, nor the
    repetition of KV heads for a kernel without GQA.

    how:         the kernel, in words.
    calls:       for each group of KV heads: the call over the prefix, if there is one, then the call over own keys.
    heads_apart: how many groups of KV heads there are.
    """

    how: str
    calls: tuple[Callable[[], Part], ...]
    heads_apart: int

    def run(self) -> list[Part]:
        return [call() for call in self.calls]

    def joined(self, parts: list[Part]) -> torch.Tensor:
        """[rows, Hq, D], from what `run` returned."""
        per_head = len(parts) // self.heads_apart
        outputs = []
        for first in range(0, len(parts), per_head):
            o, lse = parts[first]
            if per_head == 2:
                own_o, own_lse = parts[first + 1]
                o = merge_state(o, lse * LOG2_E, own_o, own_lse * LOG2_E)[0].to(own_o.dtype)
            outputs.append(o)
        o = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return o[0].transpose(0, 1)


def dense(inputs: Inputs) -> Dense:
    """Dense attention over keys and values in the order of the prompt, without a page table: in dense's favour."""
    how, attend, repeats = _dense_kernel(inputs.q.device.type, inputs.q.dtype, inputs.q.shape[2])
    rows, tokens = len(inputs.q), len(inputs.keys)
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.keys, inputs.values))
    if repeats:
        k, v = (_repeated(x, q.shape[1] // x.shape[1]) for x in (k, v))
    groups = [(q, k, v)]
    if inputs.q.numel() >= MOST_ELEMENTS:
        how += ", one head of K and V at a time because cuDNN takes no larger tensors"
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
def _dense_kernel(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend, bool]:
    """The first of these that works here: cuDNN with GQA, cuDNN with repeated KV heads, FlashAttention-2.

    Returns:
        Its name, the call, and whether KV heads must be repeated for it.
    """
    if device == "cpu":
        return "torch's CPU flash attention", _cpu, True
    tried = []
    candidates: list[tuple[str, Attend, bool]] = [
        ("cuDNN SDPA", _cudnn, False),
        ("cuDNN SDPA on repeated KV heads", _cudnn, True),
        ("FlashAttention-2 (not FA3-class) on repeated KV heads", _flash_2, True),
    ]
    for name, attend, repeats in candidates:
        try:
            if (difference := _probe(attend, repeats, dtype, head_dim)) < 0.05:
                return name, attend, repeats
            tried.append(f"{name}: differs by {difference:.3f}")
        except RuntimeError as error:
            tried.append(f"{name}: {str(error).splitlines()[0]}")
    raise NotApplicable("; ".join(tried))


def _probe(attend: Attend, repeats: bool, dtype: torch.dtype, head_dim: int) -> float:
    """The largest difference of output and LSE from plain softmax attention, for a small causal case with GQA."""
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 256, head_dim, generator=random, device="cuda").to(dtype) for h in (4, 2, 2))
    scale = head_dim**-0.5
    repeated_k, repeated_v = (_repeated(x, 2) for x in (k, v))
    out, lse = attend(q, repeated_k, repeated_v, True, scale) if repeats else attend(q, k, v, True, scale)
    wide_q, wide_k, wide_v = (x.float() for x in (q, repeated_k, repeated_v))
    future = torch.ones(256, 256, dtype=torch.bool, device="cuda").triu(1)
    scores = (wide_q @ wide_k.transpose(2, 3) * scale).masked_fill(future, -torch.inf)
    difference = (out.float() - scores.softmax(dim=-1) @ wide_v).abs().max()
    return float(torch.maximum(difference, (lse - scores.logsumexp(dim=-1)).abs().max()))


# The following take q [1, Hq, m, D], k and v [1, Hkv, n, D] and return a Part.


def _cudnn(q, k, v, causal: bool, scale: float) -> Part:
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return result[0], result[1].reshape(q.shape[:3])


def _flash_2(q, k, v, causal: bool, scale: float) -> Part:
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _cpu(q, k, v, causal: bool, scale: float) -> Part:
    result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return result[0], result[1]


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """K or V [1, Hkv, n, D] with every head `times` times: [1, Hkv * times, n, D]."""
    return x.repeat_interleave(times, dim=1)


@dataclass(frozen=True)
class Rival:
    """Another kernel on the same inputs.

    run:    the call that is timed.
    output: run it: [rows, Hq, D], in the order of the rows of q. None if its answer is another by design.
    """

    run: Callable[[], Any]
    output: Callable[[], torch.Tensor] | None = None


def flash_attention_3(inputs: Inputs, plan: BlockPlan) -> Rival:
    """Dense attention in one call with a bottom-right causal mask."""
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

    q, k, v = inputs.q[None], inputs.keys[None], inputs.values[None]
    return Rival(lambda: flash_attn_func(q, k, v, softmax_scale=inputs.scale, causal=True))


# ---- sparse, on our tiles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """The rows and keys of a plan's only pass in the order of its tiles, for kernels without a page table.

    q:      [Hq, T * block_q, D], the rows of each tile padded with zeros.
    k, v:   [Hkv, key tiles * block_k, D].
    q_stop: int32 [T * block_q], 0 for padding.
    rows:   int64 [T * block_q], the row of the inputs' q; -1 for padding.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_stop: torch.Tensor
    rows: torch.Tensor


def only_pass(plan: BlockPlan) -> BlockPlan:
    """The only pass of a plan.

    Raises:
        NotApplicable: the plan has several passes, its heads differ, or some of its tiles are gathered.
    """
    if len(plan.passes) != 1:
        raise NotApplicable(f"the plan has {len(plan.passes)} passes")
    if plan.head_groups != (tuple(range(plan.num_heads)),):
        raise NotApplicable("the heads have lists of their own")
    if int(plan.num_gathered.sum()):
        raise NotApplicable("some keys of its tiles are excluded, lane by lane")
    return plan


def gathered(inputs: Inputs, plan: BlockPlan) -> Gathered:
    sizes = plan.q_indptr.diff().long()
    lane = torch.arange(plan.block_q, device=sizes.device)
    is_row = (lane < sizes[:, None]).flatten()
    number = (plan.q_indptr[:-1].long()[:, None] + lane).flatten()[is_row]
    rows = torch.full_like(is_row, -1, dtype=torch.int64)
    rows[is_row] = plan.q_rows[number].long()
    q_stop = torch.zeros_like(rows, dtype=torch.int32)
    q_stop[is_row] = plan.q_stop[number]
    q = inputs.q[rows.clamp_min(0)].masked_fill(~is_row[:, None, None], 0)
    slots = plan.keys.kv_slots.long()
    k, v = inputs.k_cache[slots], inputs.v_cache[slots]
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return Gathered(q, k, v, q_stop, rows)


@dataclass(frozen=True)
class Flex:
    """FlexAttention on the tiles of a plan, over gathered q, k and v. Gathering them is not timed."""

    gathered: Gathered
    block_mask: Any
    run: Callable[[], torch.Tensor]

    def output(self, like: torch.Tensor) -> torch.Tensor:
        """Run it: [rows, Hq, D], in the order of the rows of `like`, and shaped like it."""
        out = torch.zeros_like(like)
        is_row = self.gathered.rows >= 0
        out[self.gathered.rows[is_row]] = self.run()[0].transpose(0, 1)[is_row]
        return out


def flex_attention(inputs: Inputs, plan: BlockPlan) -> Flex:
    """FlexAttention with the masks of our kernel: none in full tiles, positions in partial tiles."""
    from torch.nn.attention import flex_attention as flex

    block_plan = only_pass(plan)
    tensors = gathered(inputs, block_plan)
    q_stop, kv_pos = tensors.q_stop, block_plan.keys.kv_pos

    def visible(batch, head, q_index, kv_index):
        return kv_pos[kv_index] < q_stop[q_index]

    tile, block, kind = visits(block_plan)
    lists = [_lists(tile[kind == k], block[kind == k], block_plan, len(kv_pos)) for k in (1, 0)]
    block_mask = flex.BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=(block_plan.block_q, block_plan.block_k), mask_mod=visible,
        seq_lengths=(len(q_stop), len(kv_pos)),
    )  # fmt: skip
    q, k, v = (x[None] for x in (tensors.q, tensors.k, tensors.v))
    on_card = inputs.q.is_cuda
    attend = torch.compile(flex.flex_attention, dynamic=False) if on_card else flex.flex_attention
    return Flex(
        tensors, block_mask, lambda: attend(q, k, v, block_mask=block_mask, scale=inputs.scale, enable_gqa=True)
    )


def _lists(tile: torch.Tensor, block: torch.Tensor, plan: BlockPlan, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [1, 1, T] and [1, 1, T, key tiles]: how many key tiles each query tile visits, and which."""
    counts = torch.bincount(tile, minlength=plan.num_tiles)
    number = torch.arange(len(tile), device=tile.device) - (counts.cumsum(0) - counts)[tile]
    indices = torch.zeros(plan.num_tiles, keys // plan.block_k, dtype=torch.int32, device=tile.device)
    indices[tile, number] = block.to(torch.int32)
    return counts.to(torch.int32)[None, None], indices[None, None]


def flashinfer(inputs: Inputs, plan: BlockPlan) -> Rival:
    """FlashInfer's VariableBlockSparseAttentionWrapper on gathered q, k and v.

    The wrapper has no mask inside a tile, so partial tiles count as full: the same work, but a different answer along
    the diagonal.
    """
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    block_plan = only_pass(plan)
    tensors = gathered(inputs, block_plan)
    is_row = tensors.rows >= 0
    device, kv_heads = inputs.q.device, tensors.k.shape[0]
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
        tensors.q.shape[0],
        kv_heads,
        tensors.q.shape[2],
        q_data_type=inputs.q.dtype,
        sm_scale=inputs.scale,
    )
    q = tensors.q[:, is_row].contiguous()
    return Rival(lambda: wrapper.run(q, tensors.k, tensors.v))


def _flex(inputs: Inputs, plan: BlockPlan) -> Rival:
    flex = flex_attention(inputs, plan)
    return Rival(flex.run, lambda: flex.output(inputs.q))


AGAINST: dict[str, Callable[[Inputs, BlockPlan], Rival]] = {
    "flex_attention": _flex,
    "flashinfer": flashinfer,
    "flash_attention_3": flash_attention_3,
}
"""By the names of `Case.against`."""

"""Speculative decoding on a CPU: SGLang's small operators for it, and attention of its batches, in plain torch.

SGLang has them as Triton and CUDA kernels, and in a kernel package for its own CPU engine. Only the CPU platform of
this package installs these. A draft is a chain here, one token after the other (`--speculative-eagle-topk 1`, SGLang's
default), never a tree: `torch_native` has no masks. For n requests that propose `width - 1` tokens each:

* a verify batch has `width` rows for each request, the last token that is sure and those that were proposed, and a
  request's rows stand one after the other;
* the draft model proposes token after token, and writes its keys and values behind those of the request.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

# ---- operators ---------------------------------------------------------------------------------------------


def slots(
    *, req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start_offset: torch.Tensor, **sizes: Any
) -> torch.Tensor:
    """The platform's get_speculative_cache_locs_fn: int64, the KV slots of each request from `start_offset` on, request
    after request.

    Args:
        req_pool_indices: [n], the requests' rows of `req_to_token`.
        req_to_token: the KV slot of each position of each request.
        start_offset: [n], the first position.
        sizes: `draft_token_num`, the positions of each request, and more that follows from these.
    """
    positions = start_offset[:, None] + torch.arange(sizes["draft_token_num"], device=start_offset.device)
    return req_to_token[req_pool_indices[:, None], positions].flatten().long()


def note_slots(
    original: Callable[..., None],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """AROUND assign_req_to_token_pool_func: writes KV slots, request after request, to the requests' positions from
    `start_offset` to `end_offset` of `req_to_token`."""
    begin = 0
    for request, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[request, start:end] = out_cache_loc[begin : begin + end - start]
        begin += end - start


def last_slots(
    original: Callable[..., torch.Tensor],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """AROUND get_last_loc: the KV slot of the last of the first `lengths` tokens of each request; -1 where there is
    none."""
    return torch.where(lengths > 0, req_to_token[req_pool_indices, lengths - 1].to(lengths.dtype), -1)


def draft_slots(
    original: Callable[..., None],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    **positions: Any,
) -> None:
    """AROUND assign_draft_cache_locs_contiguous_func: writes the KV slots of the next `num_cols` tokens of each request
    to `out_cache_loc`."""
    out_cache_loc.copy_(
        slots(
            req_pool_indices=req_pool_indices,
            req_to_token=req_to_token,
            start_offset=seq_lens,
            draft_token_num=topk * num_cols,
        )
    )


def build_chain(
    original: Callable[..., None],
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: Any,
) -> None:
    """AROUND build_tree_kernel_efficient_func, for chains: row i of a request is followed by row i + 1.

    Writes to all tensors from `positions` to `retrieve_next_sibling`, which have `num_verify_tokens` entries for each
    request. The mask of a chain is that of causal attention, which needs none, so `tree_mask` stays as it is.
    """
    rows = torch.arange(num_verify_tokens)
    positions.copy_((seq_lens[:, None] + rows).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token.copy_(torch.where(rows + 1 < num_verify_tokens, rows + 1, -1).expand_as(retrieve_next_token))
    retrieve_next_sibling.fill_(-1)


def verify_chain(
    original: Callable[..., Any],
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AROUND verify_tree_greedy_func, for chains: a proposed token is right if it is what the target predicts one row
    earlier, and all before it are right.

    Args:
        predicts: int32 [n * width], zeros. Gets the target's token for the rows up to the last right one.
        accept_index: int32 [n, width], -1. Gets the numbers of these rows.
        accept_token_num: int32 [n]. Gets how many proposed tokens are right.
        candidates, target_predict: [n, width], the rows' tokens, and the target's token behind each.
    """
    right = (candidates[:, 1:] == target_predict[:, :-1]).long().cumprod(1).sum(1)
    sure = torch.arange(candidates.shape[1]) <= right[:, None]
    accept_token_num.copy_(right)
    accept_index.copy_(torch.where(sure, retrieve_index, -1)[:, : accept_index.shape[1]])
    predicts.copy_(torch.where(sure, target_predict, 0).flatten())
    return predicts, accept_index, accept_token_num


def last_accepted(
    original: Callable[..., None],
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """AROUND fill_bonus_tokens_func: the last of the `accept_lens` first tokens of each request, of which
    `accept_tokens` has `accept_stride`."""
    tokens = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(tokens.gather(1, accept_lens[:, None].long() - 1)[:, 0])


def select(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND select_top_k_tokens: SGLang compiles a part of it, which takes a C++ compiler and half a minute here."""
    with torch.compiler.set_stance("force_eager"):
        return original(*args, **kwargs)


def verifies_greedily(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """AROUND _verify_uses_greedy: True, as on SGLang's own CPU engine. It has no sampling for drafts there."""
    return True


def moves_nothing(original: Callable[..., None], pool: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND MHATokenToKVPool._init_kv_copy_and_warmup: the right tokens of a chain are in their place already."""
    pool._kv_copy_config = None


# ---- attention ---------------------------------------------------------------------------------------------


def attend(
    original: Callable[..., torch.Tensor],
    self: Any,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    forward_batch: Any,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """AROUND TorchNativeAttnBackend.forward_extend: a verify batch does not say how long its parts are."""
    if forward_batch.forward_mode.is_target_verify():
        prefix_lens, width = forward_batch.seq_lens, forward_batch.spec_info.draft_token_num
        forward_batch = copy.copy(forward_batch)
        forward_batch.extend_prefix_lens = prefix_lens
        forward_batch.extend_seq_lens = torch.full_like(prefix_lens, width)
        forward_batch.seq_lens = prefix_lens + width
    return original(self, q, k, v, layer, forward_batch, *args, **kwargs)


class DraftSteps:
    """The attention backends of a draft model's passes, one for each token that it proposes.

    Args:
        runner: SGLang's ModelRunner of the draft model.
        count: of passes.
    """

    def __init__(self, runner: Any, count: int) -> None:
        self.attn_backends = [_step_class()(runner, step) for step in range(count)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


@functools.cache
def _step_class() -> Any:
    """The class of one of these, made late: SGLang is not to be imported with this module."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class DraftStep(TorchNativeAttnBackend):
        """The pass that puts a token at `step` positions behind those of the request: it sees these, and itself."""

        def __init__(self, runner: Any, step: int) -> None:
            super().__init__(runner)
            self.step = step

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
        ) -> Any:
            forward_batch = copy.copy(forward_batch)
            forward_batch.seq_lens = forward_batch.seq_lens + self.step + 1
            return super().forward_decode(q, k, v, layer, forward_batch, *args, **kwargs)

    return DraftStep


def draft_steps(original: Callable[..., Any], factory: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND DraftBackendFactory.create_decode_backend. None: there is nothing to do, because the first token comes
    with the pass that fills the draft's cache."""
    runner, steps = factory.draft_model_runner, factory.speculative_num_steps - 1
    if runner.device != "cpu":
        return original(factory, *args, **kwargs)
    return DraftSteps(runner, steps) if steps > 0 else None


def draft_extend(original: Callable[..., Any], factory: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND DraftBackendFactory.create_draft_extend_backend. None: the draft model's own backend does it."""
    return None if factory.draft_model_runner.device == "cpu" else original(factory, *args, **kwargs)

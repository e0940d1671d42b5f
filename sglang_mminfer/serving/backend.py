"""The attention backend inside SGLang: the dense backend that SGLang would use, with sparse prefill on top.

The dense backend's own factory builds it; then its instance gets a subclass that is made at run time. So every flag,
buffer, CUDA-graph path and isinstance check of the stock backend still works, and only two things change: the metadata
of a prefill batch include the plan of its sparse requests, and eligible layers of such a batch run that plan. A batch
without a sparse request runs stock code only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from sglang_mminfer.serving import dense_backend, head_config_choice
from sglang_mminfer.serving.sparse_prefill import SparsePrefill
from sglang_mminfer.serving.stock_rows import second_instance


def create_backend(runner: Any) -> Any:
    """The backend of one model runner. The factory that SGLang's registry has for the name `mminfer`.

    Raises:
        HeadConfigError: if the head config does not fit the model.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    name = dense_backend.dense_backend_name(runner.server_args, runner.device)
    backend = ATTENTION_BACKENDS[name](runner)
    if runner.is_draft_worker:  # the head config was made for another model, so drafts run dense
        return backend
    head_config_choice.announce_once(runner)
    dense: Any = type(backend)
    backend.__class__ = sparse_class(dense)
    # Adaptive speculative decoding takes turns with backends, one for each number of drafts, each with a workspace of
    # its own. What was learnt of the heads holds for all of them.
    backend.mminfer = _prefills.get(runner) if runner.init_new_workspace else None
    if backend.mminfer is None:
        backend.mminfer = _prefills[runner] = SparsePrefill(
            runner, name, lambda: second_instance(ATTENTION_BACKENDS[name], name, runner)
        )
    return backend


@contextmanager
def without_room(forward_batch: Any) -> Iterator[None]:
    """Takes from a batch the room that SGLang made for the answer of all heads, where it pads a prefill or replays it
    as a CUDA graph: a stock backend that runs some of the heads would write into it."""
    room = getattr(forward_batch, "_attn_output", None)
    if room is None:
        yield
        return
    forward_batch._attn_output = None
    try:
        yield
    finally:
        forward_batch._attn_output = room


_prefills: WeakKeyDictionary[Any, SparsePrefill] = WeakKeyDictionary()
"""The sparse side of each model runner."""


@cache
def sparse_class(dense: Any) -> Any:
    """A subclass of a dense backend's class. It has no other base, so `__class__` of an instance can be set to it."""

    class Sparse(dense):
        mminfer: SparsePrefill

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.mminfer.end()
            super().init_forward_metadata(forward_batch)
            self.mminfer.begin(forward_batch)

        def init_forward_metadata_out_graph(self, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
            self.mminfer.end()  # CUDA graphs capture and replay dense attention only
            super().init_forward_metadata_out_graph(forward_batch, *args, **kwargs)

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
        ) -> Any:
            sparse = self.mminfer
            start, o = sparse.clock(), None
            masked = getattr(getattr(self, "forward_metadata", None), "custom_mask", None) is not None
            if sparse.takes(q, layer, kwargs, masked):
                if save_kv_cache and k is not None and v is not None:
                    sparse.save_kv(q, k, v, layer, forward_batch)
                    save_kv_cache = False
                dense_forward = super().forward_extend

                def stock(some_heads: torch.Tensor, view: Any) -> torch.Tensor:
                    with without_room(forward_batch):
                        return dense_forward(some_heads, k, v, view, forward_batch, False)

                o = sparse.run_layer(q, k, v, layer, stock)
            if o is None:
                o = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            sparse.layer_done(q, layer, kwargs, o, start)
            return o

    Sparse.__name__ = Sparse.__qualname__ = f"MMInfer{dense.__name__}"
    return Sparse

"""The attention backend inside SGLang: the dense backend it would have used, with sparse prefill on top.

The dense backend is built by its own factory, then its instance is given a subclass made at run time. So every
flag, buffer, graph path and isinstance check of the stock backend stays as it was, and only two things change:
metadata of prefill batches also plans sparse requests, and eligible layers of such batches run the plan. A batch
without a sparse request runs the stock code and nothing else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from sglang_mminfer.serving import dense_backend, head_config_choice
from sglang_mminfer.serving.sparse_prefill import SparsePrefill


def create_backend(runner: Any) -> Any:
    """The backend for one model runner: factory of the name `mminfer` in SGLang's registry.

    Raises:
        HeadConfigError: if the head config does not fit the model.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    name = dense_backend.dense_backend_name(runner.server_args, runner.device)
    backend = ATTENTION_BACKENDS[name](runner)
    if runner.is_draft_worker:  # a draft model's head config would be another one: dense
        return backend
    head_config_choice.announce_once(runner)
    dense: Any = type(backend)
    backend.__class__ = sparse_class(dense)
    backend.mminfer = SparsePrefill(runner, name)
    return backend


@cache
def sparse_class(dense: Any) -> Any:
    """A subclass of one dense backend. Made with that one base only, so that instances can change to it."""

    class Sparse(dense):
        mminfer: SparsePrefill

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.mminfer.end()
            super().init_forward_metadata(forward_batch)
            self.mminfer.begin(forward_batch)

        def init_forward_metadata_out_graph(self, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
            self.mminfer.end()  # what is captured in a graph, or replayed from one, is dense
            super().init_forward_metadata_out_graph(forward_batch, *args, **kwargs)

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
        ) -> Any:
            sparse = self.mminfer
            start, o = sparse.clock(), None
            masked = getattr(getattr(self, "forward_metadata", None), "custom_mask", None) is not None
            if sparse.takes(q, layer, kwargs, masked):
                if save_kv_cache and k is not None and v is not None:
                    sparse.save_kv(k, v, layer, forward_batch)
                    save_kv_cache = False
                dense_forward = super().forward_extend

                def stock(some_heads: torch.Tensor, view: Any) -> torch.Tensor:
                    return dense_forward(some_heads, k, v, view, forward_batch, False)

                o = sparse.run_layer(q, layer, stock)
            if o is None:
                o = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            sparse.layer_done(q, layer, kwargs, o, start)
            return o

    Sparse.__name__ = Sparse.__qualname__ = f"MMInfer{dense.__name__}"
    return Sparse

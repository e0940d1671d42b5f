"""A SparsePrefill with a small pool and a plain dense backend under it, to try observers on without a server."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from config_files import config_file
from sglang_mminfer.kernels.reference import masked_attention
from sglang_mminfer.serving import observe, prompts
from sglang_mminfer.serving.backend import sparse_class
from sglang_mminfer.serving.sparse_prefill import SparsePrefill
from sglang_mminfer.serving.trace import PrefillRecord

LAYERS, HEADS, KV_HEADS, D = 2, 8, 2, 16
LENGTH, SLOTS = 700, 1000
VIDEO = (100, 483)  # inclusive, as in SGLang
GRID = torch.tensor([[24, 8, 8]])  # 24 frames of 4 x 4 tokens
SCALE = D**-0.5
KV_DTYPE = torch.float32
RANKS = {"attn_tp_rank": 0, "attn_tp_size": 1, "tp_rank": 0, "tp_size": 1, "attn_dp_rank": 0, "pp_rank": 0}


class Keeps:
    """An observer that keeps what it is shown."""

    def __init__(self) -> None:
        self.views: list[observe.LayerView] = []
        self.records: list[PrefillRecord] = []

    def layer(self, view: observe.LayerView) -> None:
        self.views.append(view)

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        self.records += records


class Pool:
    """K and V of every layer, all of them there: what a batch saves is what stands there."""

    start_layer = 0

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (LAYERS, 2, SLOTS, KV_HEADS, D)
        self.layers = torch.randn(shape, generator=draw) * 1.5
        self.slots = torch.randperm(SLOTS, generator=draw)[:LENGTH]
        self.q = torch.randn(LAYERS, LENGTH, HEADS * D, generator=draw) * 1.5

    def get_kv_buffer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer, 0], self.layers[layer, 1]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.layers[layer, 0]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.layers[layer, 1]


class Stock:
    """Dense attention of one request, by its definition."""

    pool: Pool

    def init_forward_metadata(self, forward_batch: Any) -> None: ...

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True) -> Any:
        start, stop = batch.extend_prefix_lens_cpu[0], batch.seq_len
        keys, values = (cache[self.pool.slots[:stop]] for cache in self.pool.get_kv_buffer(layer.layer_id))
        causal = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        k_scale, v_scale = (getattr(layer, f"{name}_scale_float", 1.0) for name in "kv")
        by_head, group = q.view(len(q), -1, D), layer.tp_q_head_num // KV_HEADS
        heads = [
            masked_attention(by_head[:, h], keys[:, h // group], values[:, h // group], causal, SCALE * k_scale)[0]
            for h in range(layer.tp_q_head_num)
        ]
        return (torch.stack(heads, dim=1) * v_scale).flatten(1).to(q.dtype)


class Runner(SimpleNamespace):
    """A model runner, hashed by its identity as SGLang's."""

    __hash__ = object.__hash__


def runner(
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    metrics: bool = False,
    rank: int = 0,
    ranks: int = 1,
    **server_args: Any,
) -> Any:
    """A model runner that runs the head config `config`, on one of `ranks` tensor-parallel ranks."""
    placed = {"attn_tp_rank": rank, "attn_tp_size": ranks, "tp_rank": rank, "tp_size": ranks} if ranks > 1 else {}
    parallel = SimpleNamespace(**(RANKS | placed))
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: parallel)
    monkeypatch.setenv("SGLANG_MMINFER_CONFIG", config_file(config))
    monkeypatch.setattr("sglang_mminfer.serving.dense_backend.dense_backend_name", lambda *_: "torch_native")
    hf_config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": HEADS * D,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
        }
    )
    pool = Pool()
    return Runner(
        model_config=SimpleNamespace(hf_config=hf_config, num_hidden_layers=LAYERS, head_dim=D),
        server_args=SimpleNamespace(enable_metrics=metrics, **server_args),
        req_to_token_pool=SimpleNamespace(req_to_token=pool.slots[None].int()),
        token_to_kv_pool=pool,
        device="cpu",
        dtype=torch.float32,
        kv_cache_dtype=KV_DTYPE,
        is_draft_worker=False,
        init_new_workspace=False,
    )


def prefill(config: str, monkeypatch: pytest.MonkeyPatch, *observers: observe.Observer, **of_runner: Any) -> Any:
    """A SparsePrefill over a `runner`."""
    found = SparsePrefill(runner(config, monkeypatch, **of_runner), "torch_native")
    for observer in observers:
        found.observers.add(observer)
    return found


def batch(prefix: int = 0, stop: int = LENGTH, rid: str = "request-0", prompt: int = LENGTH) -> Any:
    """One request with a video: its rows [prefix, stop). What is behind token `prompt` was generated."""
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    item = MultimodalDataItem(modality=Modality.VIDEO, offsets=[VIDEO], model_specific_data={"video_grid_thw": GRID})
    media = MultimodalInputs(mm_items=[item])
    prompts.keep({rid: prompt})
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        extend_seq_lens_cpu=[stop - prefix],
        extend_prefix_lens_cpu=[prefix],
        rids=[rid],
        mm_inputs=[media],
        req_pool_indices=torch.arange(1),
        seq_len=stop,
    )


def together(*batches: Any) -> Any:
    """One batch of the requests of several."""
    joined = copy.copy(batches[0])
    for name in ("extend_seq_lens_cpu", "extend_prefix_lens_cpu", "rids", "mm_inputs"):
        setattr(joined, name, [value for one in batches for value in getattr(one, name)])
    joined.req_pool_indices = torch.zeros(len(batches), dtype=torch.long)
    prompts.keep({rid: LENGTH for rid in joined.rids})
    return joined


def layer(number: int, **changed: Any) -> Any:
    """What the backend is told of a layer."""
    fields: dict[str, Any] = {
        "layer_id": number,
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "qk_head_dim": D,
        "v_head_dim": D,
        "scaling": SCALE,
        "logit_cap": 0.0,
        "xai_temperature_len": -1,
        "sliding_window_size": -1,
        "use_irope": False,
        "is_cross_attention": False,
        "attn_type": SimpleNamespace(name="DECODER"),
    }
    return SimpleNamespace(**(fields | changed))


def run(prefill: Any, forward_batch: Any, **changed: Any) -> list[torch.Tensor]:
    """The answers [rows, HEADS * D] of all layers; `changed`: of the layers."""
    backend: Any = sparse_class(Stock)()
    backend.mminfer, backend.pool = prefill, prefill.kv_pool
    backend.init_forward_metadata(forward_batch)
    answers = []
    chunks = list(zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True))
    for number in range(LAYERS):
        q = torch.cat([prefill.kv_pool.q[number, start : start + rows] for start, rows in chunks])
        answers.append(backend.forward_extend(q, None, None, layer(number, **changed), forward_batch))
    return answers

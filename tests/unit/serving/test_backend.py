"""The attention backends of one model runner, where SGLang makes several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import observed
from observed import HEADS, LENGTH, D, Stock
from sglang_mminfer import settings
from sglang_mminfer.serving.backend import create_backend, sparse_class
from sglang_mminfer.serving.trace import TraceFile


def test_backends_of_adaptive_speculation_share_what_they_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes one for each number of drafts and takes turns with them. It makes several for two-batch overlap,
    too, whose batches run at once."""
    monkeypatch.setattr("sglang_mminfer.serving.head_config_choice.announce_once", lambda runner: None)
    runner = observed.runner("test_a_shape", monkeypatch)
    first, overlapped = create_backend(runner), create_backend(runner)
    assert first.mminfer is not overlapped.mminfer
    runner.init_new_workspace = True
    adaptive = create_backend(runner)
    assert adaptive is not overlapped and adaptive.mminfer is overlapped.mminfer
    other = observed.runner("test_a_shape", monkeypatch)
    other.init_new_workspace = True
    assert create_backend(other).mminfer is not adaptive.mminfer


def test_a_draft_model_has_the_dense_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = observed.runner("test_a_shape", monkeypatch)
    runner.is_draft_worker = True
    assert not hasattr(create_backend(runner), "mminfer")


def test_a_trace_does_not_wait_for_the_gpu_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang captures the batches that verify drafts, whose layers are those of a prefill, and CUDA allows no wait in a
    capture. In a prefill batch the times of a trace need waits."""

    class Captured(Stock):
        def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None: ...

    prefill: Any = observed.prefill("test_a_shape", monkeypatch)
    backend: Any = sparse_class(Captured)()
    backend.mminfer, backend.pool = prefill, prefill.kv_pool
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    monkeypatch.setattr(prefill, "trace", TraceFile("/dev/null"))
    batch, q = observed.batch(LENGTH - 4), prefill.kv_pool.q[0, -4:]
    for expected, init in ((False, backend.init_forward_metadata_out_graph), (True, backend.init_forward_metadata)):
        init(batch)
        monkeypatch.setattr(prefill, "device", torch.device("cuda"))
        backend.forward_extend(q, None, None, observed.layer(0), batch)
        monkeypatch.setattr(prefill, "device", torch.device("cpu"))
        assert bool(waits) == expected


class IntoRoom(Stock):
    """A stock backend that writes its answer into the batch's room for it, as SGLang's FA3 and Triton do."""

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True) -> Any:
        o = super().forward_extend(q, k, v, layer, batch, save_kv_cache)
        if batch._attn_output is None:
            return o
        room = batch._attn_output.view(-1, layer.tp_q_head_num, D)
        assert len(room) == len(q), "there is room for other heads"
        return room.copy_(o.view(room.shape)).view(len(q), -1)


def test_dense_heads_do_not_write_into_the_room_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes this room where it pads a prefill or replays it as a CUDA graph."""
    monkeypatch.setenv(settings.DENSE_HEADS.variable, "stock")
    prefill: Any = observed.prefill("test_mixed_heads", monkeypatch)
    backend: Any = sparse_class(IntoRoom)()
    backend.mminfer, backend.pool = prefill, prefill.kv_pool
    answers = []
    for room in (None, torch.full((LENGTH, HEADS * D), torch.nan)):
        batch = observed.batch()
        batch._attn_output = room
        backend.init_forward_metadata(batch)
        answers.append(
            [
                backend.forward_extend(prefill.kv_pool.q[number], None, None, observed.layer(number), batch)
                for number in range(observed.LAYERS)
            ]
        )
        assert batch._attn_output is room and prefill.failures == 0
    assert all(map(torch.equal, *answers))

"""The CPU platform: when it activates, which defaults it sets, and that SGLang then runs plain torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from families import qwen3_5
from sglang_mminfer.serving import cpu_platform

load_plugins()

on_cpu = pytest.mark.skipif(bool(cpu_platform.accelerators()), reason="this machine has an accelerator")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    text = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def resolved(model: str, **fields: Any) -> Any:
    server_args = ServerArgs(model_path=model, **fields)
    server_args.resolve_once()
    return resolving_view(server_args)


# Activation


@pytest.mark.parametrize("selected", [None, "", "mminfer_cpu", "another"])
def test_the_entry_point_waits_to_be_named(monkeypatch: pytest.MonkeyPatch, selected: str | None) -> None:
    """So a machine that lost its GPUs fails as without this package, and other platforms still work."""
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    if selected is not None:
        monkeypatch.setenv("SGLANG_PLATFORM", selected)
    assert (cpu_platform.activate() is not None) == (selected == "mminfer_cpu")


@on_cpu
@pytest.mark.parametrize(
    "environ, reason",
    [
        ({}, None),
        ({"SGLANG_PLATFORM": "mminfer_cpu"}, None),
        ({"SGLANG_PLATFORM": "mminfer_cpu", "SGLANG_USE_CPU_ENGINE": "1"}, None),
        ({"SGLANG_PLATFORM": "another"}, "SGLANG_PLATFORM=another selects another platform"),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, "SGLANG_USE_CPU_ENGINE is set"),
        ({"SGLANG_USE_CPU_ENGINE": "0"}, None),
        ({"SGLANG_PLUGINS": "mminfer"}, "SGLANG_PLUGINS=mminfer leaves it out"),
        ({"SGLANG_PLUGINS": "mminfer, mminfer_cpu"}, None),
    ],
    ids=str,
)
def test_what_keeps_it_from_a_cpu_that_was_asked_for(environ: dict[str, str], reason: str | None) -> None:
    found = cpu_platform.why_unfit(environ)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("selected", [None, "mminfer_cpu"])
def test_an_accelerator_keeps_it_away_unless_the_environment_names_it(
    monkeypatch: pytest.MonkeyPatch, selected: str | None
) -> None:
    monkeypatch.setattr(cpu_platform, "accelerators", lambda: ("cuda",))
    reason = cpu_platform.why_unfit({"SGLANG_PLATFORM": selected} if selected else {})
    assert (reason is None) == (selected is not None)


def test_another_packages_platform_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import platforms

    vendor = SimpleNamespace(is_out_of_tree=lambda: True)
    monkeypatch.setattr(platforms, "_current_platform", vendor)
    assert "of another package is active" in str(cpu_platform.why_unfit({}))


@on_cpu
def test_sglang_runs_on_it() -> None:
    from sglang.kernels.fused_op import _oot_dispatch_key
    from sglang.srt.platforms import current_platform
    from sglang.srt.utils.common import get_device, is_cpu

    assert isinstance(current_platform, cpu_platform.MMInferCpuPlatform)
    assert current_platform.is_out_of_tree()
    assert not current_platform.is_cpu() and not is_cpu()  # both stand for SGLang's CPU engine
    assert get_device() == "cpu"
    assert _oot_dispatch_key() == "native"
    assert current_platform.get_default_attention_backend() == "torch_native"


@on_cpu
def test_rope_runs_without_another_engine() -> None:
    """Stock SGLang would import vllm here."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    rope = RotaryEmbedding(16, 16, 64, 10000, True, torch.float32)
    q, k = torch.randn(5, 32), torch.randn(5, 16)
    norms = q.view(5, 2, 16).norm(dim=-1)
    rotated, _ = rope(torch.arange(5), q.clone(), k.clone())
    assert not rope.use_fallback_kernel
    assert torch.allclose(rotated.view(5, 2, 16).norm(dim=-1), norms, atol=1e-5)
    assert torch.equal(rotated[0], q[0])


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = cpu_platform.MMInferCpuPlatform()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cpu_platform, "CONTAINER_LIMIT", limit)
    whole = platform.get_device_total_memory()
    limit.write_text("1000000\n")
    assert platform.get_device_total_memory() == 1_000_000
    limit.write_text("max\n")
    assert platform.get_device_total_memory() == whole


# Defaults


@on_cpu
@pytest.mark.parametrize("backend", ["mminfer", "torch_native", None])
def test_defaults_a_cpu_needs(model: str, backend: str | None) -> None:
    view = resolved(model, attention_backend=backend)
    assert view.attention_backend == (backend or "torch_native")
    assert (view.device, view.dtype, view.mm_attention_backend) == ("cpu", "float32", "sdpa")
    assert view.sampling_backend == "pytorch"
    assert view.cuda_graph_config.decode.backend == view.cuda_graph_config.prefill.backend == "disabled"
    assert view.max_total_tokens == cpu_platform.MAX_TOTAL_TOKENS
    assert view.mem_fraction_static == cpu_platform.MEMORY_SHARE
    assert not view.disable_radix_cache and not view.disable_overlap_schedule


@on_cpu
@pytest.mark.parametrize("dtype, kept", [("auto", "float32"), ("bfloat16", None)])
def test_what_a_hybrid_model_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kept: str | None
) -> None:
    """Recurrent states are cached without Triton, few of them, and as exact as the model."""
    monkeypatch.delenv("SGLANG_MAMBA_CONV_DTYPE", raising=False)
    ids = {"<|endoftext|>": 0, "<|im_end|>": 1, "<|image_pad|>": 2, "<|video_pad|>": 3}
    config = qwen3_5.make_config(ids | {"<|vision_start|>": 4, "<|vision_end|>": 5}, 64, moe=False)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    view = resolved(str(tmp_path), attention_backend="mminfer", device="cpu", dtype=dtype)
    assert (view.prefill_attention_backend or view.attention_backend) == "mminfer"
    assert (view.uses_mamba_radix_cache, view.mamba_radix_cache_strategy) == (True, "no_buffer")
    assert view.disable_overlap_schedule and not view.disable_radix_cache
    assert view.max_mamba_cache_size == cpu_platform.MAX_RECURRENT_STATES
    assert os.environ.get("SGLANG_MAMBA_CONV_DTYPE") == kept


@on_cpu
def test_the_operators_of_delta_nets_are_in_their_places() -> None:
    """In the modules that import them by name, too."""
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.layers.attention.linear.kernels import gdn_triton
    from sglang.srt.models import qwen3_5 as model

    a, b = torch.randn(2, 3, 4)
    g, beta = gdn_backend.fused_gdn_gating(torch.zeros(4), a, b, torch.zeros(4))
    assert torch.allclose(beta[0], b.sigmoid()) and torch.allclose(g[0], -torch.nn.functional.softplus(a))
    out = model.fused_sigmoid_mul(a.clone(), b)
    assert torch.allclose(out, a * b.sigmoid())
    names = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule_packed_decode")
    assert all(getattr(gdn_triton, name).__wrapped__ for name in names)


@on_cpu
def test_dtype_is_settled_before_the_model_config_is_read(model: str) -> None:
    from sglang.srt.arg_groups.overrides import model_config_of

    server_args = ServerArgs(model_path=model)
    server_args.resolve_once()
    assert model_config_of(server_args).dtype == torch.float32  # the checkpoint says bfloat16


@on_cpu
def test_prefill_backend_alone_decodes_on_torch(model: str) -> None:
    view = resolved(model, prefill_attention_backend="mminfer")
    assert (view.prefill_attention_backend, view.attention_backend) == ("mminfer", "torch_native")


@on_cpu
def test_the_user_has_the_last_word(model: str) -> None:
    given = {
        "dtype": "bfloat16",
        "mm_attention_backend": "triton_attn",
        "max_total_tokens": 1000,
        "max_running_requests": 3,
        "max_mamba_cache_size": 9,
        "mem_fraction_static": 0.3,
        "attention_backend": "torch_native",
    }
    view = resolved(model, **given)
    assert {field: getattr(view, field) for field in given} == given


@on_cpu
def test_ranks_share_memory_and_cores(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # the user's binding stays
    view = resolved(model, tp_size=2)
    assert view.mem_fraction_static == cpu_platform.MEMORY_SHARE / 2
    assert cpu_platform.os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"


@pytest.mark.parametrize(
    "ranks, nodes, cores, binding",
    [
        (1, 1, [0, 1], None),
        (2, 2, [0, 1, 2, 3], None),
        (2, 1, [0, 1], "0|1"),
        (2, 1, [0, 2, 4, 6, 8], "0,2|4,6"),
        (3, 1, [0, 1], "0|1|0"),
    ],
)
def test_core_binding(ranks: int, nodes: int, cores: list[int], binding: str | None) -> None:
    assert cpu_platform.core_binding(ranks, nodes, cores) == binding


def test_other_devices_are_left_alone() -> None:
    assert cpu_platform.default_arguments(SimpleNamespace(device="cuda")) == {}


# Pinning


@on_cpu
def test_pinning_is_a_no_op() -> None:
    tensor = torch.arange(4)
    assert tensor.pin_memory() is tensor
    assert torch.Tensor.pin_memory.__name__ == "pin_memory"

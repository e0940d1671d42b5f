"""The check that a server on a GPU runs before its first request, on the executors that run on this machine."""

import re
from types import SimpleNamespace

import pytest
import torch

import support
from sglang_mminfer.kernels import executors
from sglang_mminfer.kernels.executors import EXECUTORS
from sglang_mminfer.serving.self_check import FAR, LONG_ROWS, REPEATS, check, compilers, first_fit, why_unfit


@pytest.mark.parametrize(
    "dtype, kv_dtype",
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float16, torch.float8_e5m2),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", support.EXECUTORS)
def test_executors_are_found_right(name, dtype, kv_dtype):
    estimates = support.INTERPRETED and kv_dtype is not None
    answer = check(
        EXECUTORS[name], "cpu", dtype, 32, num_heads=6, num_kv_heads=2, kv_dtype=kv_dtype, estimates=estimates
    )
    assert answer.good, str(answer)


def test_a_cache_of_fp8_is_read_where_the_gpu_converts_it(monkeypatch):
    wide = torch.float32, torch.bfloat16, torch.float16
    assert all(executors.why_unread(dtype, CPU) is None for dtype in (*wide, torch.float8_e4m3fn, torch.float8_e5m2))
    assert "expected one of float32" in executors.why_unread(torch.uint8, CPU)
    for capability, words in (((8, 0), "before sm_89"), ((8, 9), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        found = executors.why_unread(torch.float8_e4m3fn, CUDA)
        assert found is None if words is None else words in found
        assert executors.why_unread(torch.float8_e5m2, CUDA) is None


def wrong_once_in_a_while(q, k_cache, v_cache, plan, sm_scale, out, lse):
    EXECUTORS["torch"](q, k_cache, v_cache, plan, sm_scale, out, lse)
    out[len(out) // 2, 1] += 0.5


def leaves_a_row(q, k_cache, v_cache, plan, sm_scale, out, lse):
    EXECUTORS["torch"](q, k_cache, v_cache, plan, sm_scale, out, lse)
    out[7] = torch.nan


def differs_from_run_to_run(q, k_cache, v_cache, plan, sm_scale, out, lse):
    EXECUTORS["torch"](q, k_cache, v_cache, plan, sm_scale, out, lse)
    out += 1e-6 * torch.rand(())


def wrong_in_long_lists(q, k_cache, v_cache, plan, sm_scale, out, lse):
    EXECUTORS["torch"](q, k_cache, v_cache, plan, sm_scale, out, lse)
    if len(q) == LONG_ROWS:
        out[1:] = out[:-1].clone()


def base_e(q, k_cache, v_cache, plan, sm_scale, out, lse):
    EXECUTORS["torch"](q, k_cache, v_cache, plan, sm_scale, out, lse)
    lse *= 0.693


@pytest.mark.parametrize(
    "run", [wrong_once_in_a_while, leaves_a_row, differs_from_run_to_run, wrong_in_long_lists, base_e]
)
def test_wrong_executors_are_found_out(run):
    assert not check(run, "cpu", torch.float32, 16).good


def test_a_thorough_check_repeats_and_has_long_lists():
    seen = []

    def run(q, k_cache, v_cache, plan, *rest):
        seen.append((len(q), len(plan.block_indices), k_cache.stride(0) * len(k_cache)))
        EXECUTORS["torch"](q, k_cache, v_cache, plan, *rest)

    assert check(run, "cpu", torch.float32, 16, thorough=True, pool_elements=FAR).runs == REPEATS
    assert len(seen) == 2 * REPEATS and seen[-1][0] == LONG_ROWS and seen[-1][1] * 64 >= 10_000
    assert seen[-1][2] < FAR, "a pool as large as a server's is for GPUs"


@pytest.mark.skipif(not support.INTERPRETED, reason="the kernels of the estimate: in Triton's interpreter")
def test_only_a_right_estimate_is_found_right(monkeypatch):
    from sglang_mminfer.kernels.triton import estimate

    def checked():
        return check(EXECUTORS["torch"], "cpu", torch.float32, 32, num_heads=6, num_kv_heads=2, estimates=True)

    assert checked().good
    right = estimate.estimate
    monkeypatch.setattr(estimate, "estimate", lambda *arguments: tuple(x * 1.01 for x in right(*arguments)))
    assert not checked().good


def test_the_log_names_the_compilers():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        assert re.fullmatch(r"triton \d+\.\d+\.\d+.*, ptxas \d+\.\d+.*", compilers(torch.device("cuda")))


RUNNER = SimpleNamespace(
    model_config=SimpleNamespace(num_attention_heads=4, get_num_kv_heads=lambda ranks: 2, head_dim=16),
    dtype=torch.bfloat16,
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they run")


@no_gpu
def test_an_executor_that_does_not_run_leaves_the_server_dense_and_says_so(caplog):
    """As on a GPU whose compiler or driver rejects the kernel; here there is no GPU at all."""
    assert why_unfit(RUNNER, "triton", CUDA, 1, "fa3") == "executor_failed"
    assert "the triton executor does not run here; everything runs dense" in caplog.text
    assert why_unfit(RUNNER, "torch", CPU, 1, "torch_native") is None


@no_gpu
def test_executors_are_tried_in_order_and_those_that_fail_are_ruled_out(caplog, monkeypatch):
    monkeypatch.setattr(executors, "ruled_out", set())
    assert first_fit(RUNNER, ("fa4", "triton"), CUDA, 1, "fa3") == ("triton", "executor_failed")
    assert "the fa4 executor does not run here; triton is tried next" in caplog.text
    assert "the triton executor does not run here; everything runs dense" in caplog.text
    monkeypatch.setattr("sglang_mminfer.kernels.fa4.why_unavailable", lambda *case: None)
    assert executors.names_for("auto", CUDA, 128, 64, torch.bfloat16) == ("triton",)
    assert first_fit(RUNNER, ("torch",), CPU, 1, "torch_native") == ("torch", None)


def test_auto_is_the_fastest_that_has_kernels_for_the_case(caplog, monkeypatch):
    caplog.set_level("INFO")
    case = 128, 64, torch.bfloat16
    assert executors.names_for("auto", CPU, *case) == ("torch",)
    assert executors.names_for("flashinfer", CUDA, *case) == ("flashinfer",)
    assert executors.names_for("fa4", CUDA, *case) == ("fa4",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("sglang_mminfer.kernels.fa4.why_not_installed", lambda: None)
    assert executors.names_for("auto", CUDA, *case) == ("fa4", "triton")
    for refused, why in (
        ((80, 64, torch.bfloat16), "the head dim is 80"),
        ((256, 128, torch.bfloat16), "key tiles have 128 keys"),
        ((128, 64, torch.float32), "computes in torch.float32"),
    ):
        assert executors.name_for("auto", CUDA, *refused) == "triton"
        assert why in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert executors.name_for("auto", CUDA, *case) == "triton" and "the GPU is sm_80" in caplog.text

"""The check that a server on a GPU runs before its first request, on the executors that run on this machine."""

import re
from types import SimpleNamespace

import pytest
import torch

import support
from sglang_mminfer.kernels.executors import EXECUTORS, name_for
from sglang_mminfer.serving.self_check import FAR, LONG_ROWS, REPEATS, check, compilers, why_unfit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", support.EXECUTORS)
def test_executors_are_found_right(name, dtype):
    answer = check(EXECUTORS[name], "cpu", dtype, 32, num_heads=6, num_kv_heads=2)
    assert answer.good, str(answer)


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


def test_an_executor_that_does_not_run_leaves_the_server_dense_and_says_so(caplog):
    """As on a GPU whose compiler or driver rejects the kernel; here there is no GPU at all."""
    assert not torch.cuda.is_available() or pytest.skip("there is a GPU, on which it runs")
    runner = SimpleNamespace(
        model_config=SimpleNamespace(num_attention_heads=4, get_num_kv_heads=lambda ranks: 2, head_dim=16),
        dtype=torch.bfloat16,
    )
    assert why_unfit(runner, "triton", torch.device("cuda"), 1, "fa3") == "executor_failed"
    assert "the triton executor does not run here; everything runs dense" in caplog.text
    assert why_unfit(runner, "torch", torch.device("cpu"), 1, "torch_native") is None


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere():
    assert [name_for("auto", torch.device(d)) for d in ("cuda", "cpu")] == ["triton", "torch"]
    assert name_for("flashinfer", torch.device("cuda")) == "flashinfer"

"""The benchmarks on a real GPU (`make test-gpu`): what their clock leaves out, and one small case."""

import time

import pytest
import torch

from sglang_mminfer.benchmarks import cases, measure
from sglang_mminfer.benchmarks.tile_attention import Bench
from sglang_mminfer.planning.tiles import BLOCK_K

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_time_of_the_host_is_not_in_an_interval():
    x = torch.zeros(1024, device="cuda")

    def work() -> None:
        time.sleep(0.005)
        x.add_(1)

    timing = measure.timed(work, "cuda")
    assert timing.ms < 1 and timing.issue_ms > 5


def test_the_work_of_the_device_is_in_an_interval():
    timing = measure.timed(lambda: torch.cuda._sleep(10 * measure.CYCLES_OF_A_MS), "cuda")
    assert timing.ms > 8 and timing.issue_ms < 5


@pytest.mark.parametrize("pattern", [cases.GRID_STATIC, cases.SEARCHED])
def test_a_small_case(pattern):
    figures = Bench("cuda", "triton", BLOCK_K).run(cases.Case("28/4", 8192, 2048, pattern))
    assert figures["difference"] < 1e-2 and figures["plan_host_ms"] > 0 and figures["dense_ms"] > 0
    assert measure.describe_card()["ptxas"]

"""flash-attn-4's kernels with our mask and lists, compiled and called for cards that this machine lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_mminfer.kernels import fa4
from sglang_mminfer.kernels.fa4.ahead_of_time import BUILDS, report_of, reports

pytestmark = pytest.mark.skipif(fa4.why_not_installed() is not None, reason=str(fa4.why_not_installed()))


@pytest.mark.parametrize("capability", BUILDS)
def test_builds_have_no_spills_and_no_products_that_wait_for_each_other(capability):
    for build, report in zip(BUILDS[capability], reports(capability, BUILDS[capability])):
        assert (report.stack, report.spills, report.warnings) == (0, 0, ()), (build, report)


def test_what_the_assembler_warns_of_is_seen():
    """Its words on a build for 256 dims over the cache, whose products have too few registers."""
    report = report_of(
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are\n"
        "    824 bytes stack frame, 4176 bytes spill stores, 4476 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    assert (report.registers, report.stack, report.spills) == (168, 824, 8652)
    assert len(report.warnings) == 1 and "C7512" in report.warnings[0]


@pytest.mark.parametrize("capability, keys", [(90, "cache"), (100, "gathered")])
def test_compiled_functions_take_the_arguments_that_they_are_called_with(capability, keys, tmp_path):
    """Compiled, then again from disk. All arguments are checked before the missing driver is missed."""
    for origin in ("compiled", "kept"):
        done = subprocess.run(
            [sys.executable, Path(__file__).parents[2] / "helpers" / "fa4_call.py", str(capability), keys],
            env=os.environ | {"CUTE_DSL_ARCH": f"sm_{capability}a", "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [origin, "called"], done.stdout + done.stderr[-3000:]

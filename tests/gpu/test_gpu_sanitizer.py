"""The kernel's small case under compute-sanitizer (`make test-gpu-sanitize`): no access beyond a tensor, no race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed (it comes with the CUDA toolkit)"),
]


@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_the_small_case_is_clean(check):
    """Each tensor has an allocation of its own, so that the sanitizer sees any access beyond a tensor."""
    assert TOOL is not None
    program = [sys.executable, "-m", "sglang_mminfer.benchmarks.smoke", "--check-only"]
    done = subprocess.run(
        [TOOL, "--tool", check, "--error-exitcode", "9", *program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONSAFEPATH": "1"},
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-2000:]

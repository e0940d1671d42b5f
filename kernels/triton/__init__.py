"""The GPU executor: one Triton kernel that runs any BlockPlan, whatever pattern made the plan."""

import os


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device (TRITON_INTERPRET=1): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"

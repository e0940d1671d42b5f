"""Compiles FlashAttention-4's forward as this executor calls it for GPUs that this machine lacks, and reports on it.

python -m sglang_mminfer.kernels.fa4.ahead_of_time [CAPABILITY HEAD_DIM BLOCK_K cache|gathered]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

COMMAND = (sys.executable, "-m", __name__ if __name__ != "__main__" else "sglang_mminfer.kernels.fa4.ahead_of_time")
BUILDS = (
    (90, 128, 64, "cache"),
    (90, 128, 128, "cache"),
    (90, 128, 64, "gathered"),
    (90, 128, 128, "gathered"),
    (90, 64, 64, "cache"),
    (90, 96, 64, "cache"),
    (90, 256, 64, "gathered"),
    (100, 128, 64, "gathered"),
    (100, 128, 128, "gathered"),
)


@dataclass(frozen=True)
class Report:
    """What the assembler says of one build.

    registers: of a thread, as the kernel starts.
    stack:     bytes of a thread's stack frame.
    spills:    bytes stored to and loaded from local memory.
    warnings:  all that it warns of, such as matrix products that wait for each other (C7510 and the like).
    """

    registers: int
    stack: int
    spills: int
    warnings: tuple[str, ...]


def report(capability: int, head_dim: int, block_k: int, keys: str) -> Report:
    """Compile bfloat16 in a process of its own, because the compiler reads its target once.

    Raises:
        RuntimeError: it does not compile; with the end of what the compiler said.
    """
    environment = os.environ | {
        "CUTE_DSL_ARCH": f"sm_{capability}a",
        "CUTE_DSL_COMPILER_OPT": "warnings{ptx},remarks{ptx}",
    }
    command = [*COMMAND, *map(str, (capability, head_dim, block_k, keys))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = done.stdout
    if done.returncode:
        raise RuntimeError(said[-3000:])
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (stack,) = re.findall(r"(\d+) bytes stack frame", said)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return Report(int(registers), int(stack), spills, tuple(re.findall(r".*(?:\bC7\d\d\d\b|ptxas warning).*", said)))


def main() -> None:
    if len(sys.argv) == 1:
        for build in BUILDS:
            print(*build, report(*build), flush=True)
        return
    import torch

    from .forward import Kind, compile_kind

    capability, head_dim, block_k = map(int, sys.argv[1:4])
    compile_kind(Kind(capability, torch.bfloat16, head_dim, block_k, sys.argv[4] == "gathered"))


if __name__ == "__main__":
    main()

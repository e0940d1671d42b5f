"""Compiles FlashAttention-4's forward as this executor calls it for GPUs that this machine lacks, and reports on it.

    python -m sglang_mminfer.kernels.fa4.ahead_of_time

This needs no GPU. Spilled registers, and matrix products that wait for each other, make a kernel slow without making
it wrong, so a test checks that no build has either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

PROGRAM = "sglang_mminfer.kernels.fa4.ahead_of_time"
BUILDS = {
    90: ("128 64 cache", "128 128 cache", "128 64 gathered", "256 64 gathered"),
    100: ("128 64 gathered", "128 128 gathered"),
}
"""What the launcher asks for on GPUs of each compute capability: head dim, keys of a key tile, and where K and V are
read."""


@dataclass(frozen=True)
class Report:
    """What the assembler says of one build.

    registers: of a thread, as the kernel starts.
    stack:     bytes of a thread's stack frame.
    spills:    bytes stored to and loaded from local memory.
    warnings:  what it warns of, such as matrix products that wait for each other (C7510 and the like).
    """

    registers: int
    stack: int
    spills: int
    warnings: tuple[str, ...]


def reports(capability: int, builds: tuple[str, ...]) -> list[Report]:
    """Compile builds for bfloat16, in a process of their own, because the compiler reads its target once.

    Raises:
        RuntimeError: one of them does not compile; with the end of what the compiler said.
    """
    environment = os.environ | {
        "CUTE_DSL_ARCH": f"sm_{capability}a",
        "CUTE_DSL_COMPILER_OPT": "warnings{ptx},remarks{ptx}",
    }
    command = [sys.executable, "-m", PROGRAM, str(capability), *builds]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _, *said = done.stdout.split(f"\n{PROGRAM}\n")
    if done.returncode or len(said) != len(builds):
        raise RuntimeError(done.stdout[-3000:])
    return [report_of(text) for text in said]


def report_of(said: str) -> Report:
    """From the assembler's words on one kernel."""
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (stack,) = re.findall(r"(\d+) bytes stack frame", said)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    warnings = re.findall(r".*(?:\(C7\d\d\d\)|ptxas warning).*", said)
    return Report(int(registers), int(stack), spills, tuple(warning.strip() for warning in warnings))


def main() -> None:
    if len(sys.argv) == 1:
        for capability, builds in BUILDS.items():
            for build, report in zip(builds, reports(capability, builds)):
                print(f"sm_{capability}", build, report, flush=True)
        return
    import torch

    from .forward import Kind, compile_kind

    for build in sys.argv[2:]:
        head_dim, block_k, keys = build.split()
        print(f"\n{PROGRAM}", flush=True)
        compile_kind(Kind(int(sys.argv[1]), torch.bfloat16, int(head_dim), int(block_k), keys == "gathered"))


if __name__ == "__main__":
    main()

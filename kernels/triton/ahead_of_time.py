"""Compiles the kernels for GPUs that this machine lacks, and prints the registers, spills and shared memory of each.

    python -m sglang_mminfer.kernels.triton.ahead_of_time

This needs no GPU: Triton brings NVIDIA's assembler. Spilled registers and missing tensor core instructions make a
kernel slow without making it wrong, so a test checks that no build has either.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import estimate, merge
from .configurations import HEAD_DIMS, Configuration, configuration
from .tile_attention import tile_attention

CAPABILITIES = (80, 90, 100)
DTYPES = ("fp16", "bf16")
BLOCK_K = 64  # keys of a key tile; the planner's default


@dataclass(frozen=True)
class Build:
    """One compiled kernel.

    registers:    of a thread.
    spills:       bytes stored to and loaded from local memory.
    shared:       bytes of shared memory of a program.
    tensor_cores: the tensor core instruction that the kernel uses most.
    """

    kernel: str
    capability: int
    dtype: str
    head_dim: int
    configuration: Configuration
    registers: int
    spills: int
    shared: int
    tensor_cores: str

    def __str__(self) -> str:
        c = self.configuration
        return (
            f"{self.kernel} sm_{self.capability} {self.dtype} head dim {self.head_dim:3d}: "
            f"{c.rows}x{BLOCK_K}, {c.num_warps} warps, {c.num_stages} stages: {self.registers} registers, "
            f"{self.spills} bytes spilled, {self.shared // 1024} KiB shared, {self.tensor_cores}"
        )


def compile_build(capability: int, dtype: str, head_dim: int, chosen: Configuration | None = None) -> Build:
    """Compile the attention kernel as the launcher would on a GPU of this capability, for 7 query heads a KV head."""
    chosen = chosen or configuration(head_dim, capability)
    constants = {
        "GROUP": 7,
        "NUM_HEADS": 28,
        "HEAD_DIM": head_dim,
        "BLOCK_M": chosen.rows,
        "BLOCK_N": BLOCK_K,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_K": BLOCK_K,
        "WORDS": -(-BLOCK_K // 32),
    }
    return _compiled(tile_attention, capability, dtype, head_dim, constants, chosen)


def compile_merge(capability: int, dtype: str, head_dim: int) -> Build:
    """Compile the kernel that joins the parts of items, for plans of two passes."""
    chosen = Configuration(rows=merge.BLOCK, num_warps=4, num_stages=3)
    constants = {
        "PASSES": 2,
        "ITEM_PAIRS": configuration(head_dim, capability).rows,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK": merge.BLOCK,
    }
    return _compiled(merge.merge_slots, capability, dtype, head_dim, constants, chosen)


def compile_estimate(capability: int, dtype: str, head_dim: int) -> list[Build]:
    """Compile the two kernels of the estimate as their launcher would on a GPU of this capability."""
    chosen = estimate.configuration(head_dim, capability)
    constants = {
        "GROUP": 7,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_N": estimate.BLOCK,
    }
    kernels = (estimate.row_lse, estimate.masses)
    return [_compiled(kernel, capability, dtype, head_dim, constants, chosen) for kernel in kernels]


_FLOATS = {"lse", "slots_out", "slots_lse", "columns", "diagonals", "carried"}
_SCALARS = {"num_pairs", "num_rows", "num_keys", "first_frontier", "tiles_each"}


def _compiled(
    kernel: Any,
    capability: int,
    dtype: str,
    head_dim: int,
    constants: dict[str, Any],
    chosen: Configuration,
) -> Build:
    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("q", "k_cache", "v_cache", "out"):
            return f"*{dtype}"
        if name == "scale":
            return "fp32"
        if name in _FLOATS:
            return "*fp32"
        return "i32" if name in _SCALARS or name.startswith("stride") else "*i32"

    names = kernel.arg_names
    signature = {name: argument_type(name) for name in names}
    # The launcher's tensors begin at multiples of 16 bytes, and their strides are multiples of 16 elements.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen.options)
    registers, spills = _assembler_report(built.asm["ptx"])
    instructions = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", built.asm["ptx"])
    tensor_cores = max(set(instructions), key=instructions.count) if instructions else "no tensor cores"
    return Build(
        kernel.fn.__name__, capability, dtype, head_dim, chosen, registers, spills, built.metadata.shared, tensor_cores
    )


def _assembler_report(ptx: str) -> tuple[int, int]:
    """(registers of a thread, bytes of spill stores and loads), as the assembler reports them."""
    (architecture,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_assembler(architecture), "-v", f"--gpu-name={architecture}", str(path), "-o", f"{path}.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return registers, spills


def _assembler(architecture: str) -> str:
    from triton import knobs

    blackwell = int(re.findall(r"\d+", architecture)[0]) >= 100
    return (knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas).path


def builds() -> Iterator[Build]:
    """Every build that the launchers may ask for."""
    for capability, dtype, head_dim in product(CAPABILITIES, DTYPES, HEAD_DIMS):
        yield compile_build(capability, dtype, head_dim)
        yield compile_merge(capability, dtype, head_dim)
        yield from compile_estimate(capability, dtype, head_dim)


if __name__ == "__main__":
    for build in builds():
        print(build, flush=True)

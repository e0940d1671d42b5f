"""Compiles the kernels for GPUs that this machine lacks, and prints the registers, spills and shared memory of each.

    python -m sglang_mminfer.kernels.triton.ahead_of_time

This needs no GPU: Triton brings NVIDIA's assembler. Spilled registers, missing tensor core instructions and wgmma that
the assembler serialises make a kernel slow without making it wrong; a loop without a proxy fence between its copies
and its wgmma may make it wrong, and nothing says so. A test checks that no build has any of these.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import estimate, low_rank_scan, merge, picked_keys
from .configurations import HEAD_DIMS, Configuration, configuration
from .tile_attention import tile_attention

CAPABILITIES = (80, 90, 100)
DTYPES = ("fp16", "bf16")
FP8_CACHES = ((89, "fp8e4nv"), (90, "fp8e4nv"), (100, "fp8e4nv"), (80, "fp8e5"))
"""Capabilities, and fp8 KV caches that they read. Other dtypes and capabilities differ in one conversion."""
BLOCK_K = 64  # keys of a key tile; the planner's default
RANK = 8  # of low-rank scores


@dataclass(frozen=True)
class Build:
    """One compiled kernel.

    dtype, cache: of queries, and of keys and values.
    registers:    of a thread.
    spills:       bytes stored to and loaded from local memory.
    shared:       bytes of shared memory of a program.
    tensor_cores: the tensor core instruction that the kernel uses most.
    serialized:   whether the assembler waits for every wgmma by itself (its advisories C7510 and C7512).
    unfenced:     loops that copy with cp.async what wgmma or tcgen05 reads, without a `fence.proxy.async`: `fences.py`.
    """

    kernel: str
    capability: int
    dtype: str
    cache: str
    head_dim: int
    configuration: Configuration
    registers: int
    spills: int
    shared: int
    tensor_cores: str
    serialized: bool
    unfenced: int

    def __str__(self) -> str:
        c, dtypes = self.configuration, "/".join(dict.fromkeys((self.dtype, self.cache)))
        return (
            f"{self.kernel} sm_{self.capability} {dtypes} head dim {self.head_dim:3d}: "
            f"{c.rows}x{BLOCK_K}, {c.num_warps} warps, {c.num_stages} stages: {self.registers} registers, "
            f"{self.spills} bytes spilled, {self.shared // 1024} KiB shared, {self.tensor_cores}"
            f"{', serialized' * self.serialized}{f', {self.unfenced} loops without a fence' * bool(self.unfenced)}"
        )


def compile_build(
    capability: int, dtype: str, head_dim: int, chosen: Configuration | None = None, cache: str | None = None
) -> Build:
    """Compile the attention kernel as the launcher would on a GPU of this capability, for 7 query heads a KV head.

    Args:
        cache: Triton's name of the dtype of keys and values. Default: that of the queries, as for all builds.
    """
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
    return _compiled(tile_attention, capability, dtype, head_dim, constants, chosen, cache)


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


def compile_estimate(capability: int, dtype: str, head_dim: int, cache: str | None = None) -> list[Build]:
    """Compile the two kernels of the estimate as their launcher would on a GPU of this capability."""
    chosen = estimate.configuration(head_dim, capability, (cache or dtype).startswith("fp8"))
    constants = {
        "GROUP": 7,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_N": estimate.BLOCK,
    }
    kernels = (estimate.row_lse, estimate.masses)
    return [_compiled(kernel, capability, dtype, head_dim, constants, chosen, cache) for kernel in kernels]


def compile_choice(capability: int, dtype: str, head_dim: int, rank: int, cache: str | None = None) -> list[Build]:
    """Compile the kernels that choose keys by scores of this rank, the scan itself first, as their launchers would on a
    GPU of this capability."""
    scan = low_rank_scan.configuration(capability)
    beside = Configuration(scan.rows, **low_rank_scan.OPTIONS)
    sizes = low_rank_scan.sizes_of(head_dim, rank)
    parts = {"fp16": 2, "bf16": 3, "fp8e4nv": 2, "fp8e5": 2}
    keys = low_rank_scan.KEYS
    kernels: list[tuple[Any, dict[str, Any], Configuration]] = [
        (
            low_rank_scan.any_row_above,
            _scan_constants(scan, rank),
            Configuration(scan.rows, scan.num_warps, scan.num_stages),
        ),
        (low_rank_scan.low_rank_keys, {**sizes, "PARTS": parts[cache or dtype], "KEYS": keys}, beside),
        (low_rank_scan.low_rank_queries, {**sizes, "PARTS": parts[dtype], "KEYS": keys, "ROWS": scan.rows}, beside),
        (low_rank_scan.asked_side_by_side, {"SPAN": scan.span, "BLOCK": 1024}, Configuration(1, 4, 3)),
        (
            picked_keys.picked_keys,
            {"PAD_POSITION": 1 << 30, "BLOCK_K": BLOCK_K, "BLOCK": picked_keys.BLOCK},
            Configuration(1, 4, 3),
        ),
    ]
    return [
        _compiled(kernel, capability, dtype, head_dim, constants, chosen, cache)
        for kernel, constants, chosen in kernels
    ]


def compile_for_fp8(capability: int, cache: str, head_dim: int) -> list[Build]:
    """Compile the kernels that read a KV cache, for one of an fp8 dtype and queries of bf16."""
    return [
        compile_build(capability, "bf16", head_dim, cache=cache),
        *compile_estimate(capability, "bf16", head_dim, cache),
        *compile_choice(capability, "bf16", head_dim, RANK, cache)[1:3],
    ]


_FLOATS = {"lse", "slots_out", "slots_lse", "columns", "diagonals", "carried", "basis_queries", "basis_keys"}
_HALVES = {"low_keys", "low_queries"}
_LONGS = {"rows", "first_lanes"}
_SCALARS = {"num_pairs", "num_rows", "num_keys", "first_frontier", "tiles_each"}
_SCALARS |= {"num_tiles", "num_asked", "sink", "local", "num_lanes", "first_lane", "first_picked"}


def scan_loop(rank: int, capability: int = 90) -> dict[str, int]:
    """How many instructions of each kind a warp runs in the scan for `ScanConfiguration.keys` keys and its heads: those
    of the loop that multiplies, as the assembler makes it."""
    scan = low_rank_scan.configuration(capability)
    chosen = Configuration(scan.rows, scan.num_warps, scan.num_stages)
    constants = _scan_constants(scan, rank)
    ptx = _built(low_rank_scan.any_row_above, capability, "fp16", "fp16", constants, chosen).asm["ptx"]
    (architecture,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        assembler = Path(_assembler(architecture))
        cubin = f"{path}.cubin"
        subprocess.run([assembler, f"--gpu-name={architecture}", path, "-o", cubin], check=True, capture_output=True)
        done = subprocess.run([assembler.parent / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True)
    return loop_instructions(done.stdout)


def loop_instructions(sass: str) -> dict[str, int]:
    """How often each kind of instruction stands in the shortest loop that has one of the matrix unit's."""
    lines, labels, loops = sass.splitlines(), dict[str, int](), list[list[str]]()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = number
        jump = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        if jump and jump[1] in labels:  # backwards, so a loop ends here
            names = re.findall(
                r"/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", "\n".join(lines[labels[jump[1]] : number + 1])
            )
            if any(name.endswith("MMA") for name in names):
                loops.append(names)
    shortest = min(loops, key=len)
    return dict(Counter(shortest).most_common())


def _scan_constants(scan: low_rank_scan.ScanConfiguration, rank: int) -> dict[str, Any]:
    width = low_rank_scan.width_of(rank)
    return {"ROWS": scan.rows, "KEYS": scan.keys, "HEADS": scan.heads, "SPAN": scan.span, "WIDTH": width}


def _built(
    kernel: Any, capability: int, dtype: str, cache: str, constants: dict[str, Any], chosen: Configuration
) -> Any:
    """What Triton makes of a kernel."""

    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("q", "out"):
            return f"*{dtype}"
        if name in ("k_cache", "v_cache"):
            return f"*{cache}"
        if name in ("scale", "extra"):
            return "fp32"
        if name in _FLOATS:
            return "*fp32"
        if name in _HALVES:
            return "*fp16"
        if name in _LONGS:
            return "*i64"
        if name == "asked":
            return "*i8"
        return "i32" if name in _SCALARS or name.startswith("stride") else "*i32"

    names = kernel.arg_names
    signature = {name: argument_type(name) for name in names}
    # The launcher's tensors begin at multiples of 16 bytes, if it does not say otherwise, and their strides are
    # multiples of 16 elements.
    anywhere = kernel.do_not_specialize_on_alignment or ()
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name][0] == "*" and name not in anywhere) or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen.options)


def _compiled(
    kernel: Any,
    capability: int,
    dtype: str,
    head_dim: int,
    constants: dict[str, Any],
    chosen: Configuration,
    cache: str | None = None,
) -> Build:
    cache = cache or dtype
    built = _built(kernel, capability, dtype, cache, constants, chosen)
    report = _assembler_report(built.asm["ptx"])
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    instructions = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", built.asm["ptx"])
    tensor_cores = max(set(instructions), key=instructions.count) if instructions else "no tensor cores"
    return Build(
        kernel.fn.__name__,
        capability,
        dtype,
        cache,
        head_dim,
        chosen,
        registers,
        spills,
        built.metadata.shared,
        tensor_cores,
        serialized=re.search(r"C751[02]", report) is not None,
        unfenced=unfenced_loops(built.asm["ptx"]),
    )


def unfenced_loops(ptx: str) -> int:
    """How many loops copy asynchronously and multiply on the matrix unit without a proxy fence between; see `Build`."""
    lines, labels, count = ptx.splitlines(), {}, 0
    for number, line in enumerate(lines):
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = number
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if jump and jump[1] in labels:  # backwards, so a loop ends here
            body = "\n".join(lines[labels[jump[1]] : number])
            multiplies = re.search(r"wgmma\.mma_async|tcgen05\.mma", body) and "cp.async." in body
            count += bool(multiplies) and "fence.proxy.async" not in body
    return count


def _assembler_report(ptx: str) -> str:
    """What the assembler says of a kernel: registers, spills, advisories."""
    (architecture,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_assembler(architecture), "-v", f"--gpu-name={architecture}", str(path), "-o", f"{path}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


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
        yield from compile_choice(capability, dtype, head_dim, RANK)
    for (capability, cache), head_dim in product(FP8_CACHES, HEAD_DIMS):
        yield from compile_for_fp8(capability, cache, head_dim)


if __name__ == "__main__":
    for build in builds():
        print(build, flush=True)

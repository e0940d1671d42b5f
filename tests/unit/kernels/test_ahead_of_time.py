"""Compiles every build of the GPU kernels that the launchers may ask for, without a GPU."""

import pytest

from sglang_mminfer.kernels.triton import ahead_of_time
from sglang_mminfer.kernels.triton.configurations import HEAD_DIMS, Configuration, configuration

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have
ROUNDING = 16  # bytes; from one run of the compiler to the next the same source may differ by a register or two
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_builds_spill_nothing_fit_and_use_the_tensor_cores(capability, head_dim):
    for dtype in ahead_of_time.DTYPES:
        build = ahead_of_time.compile_build(capability, dtype, head_dim)
        assert build.spills <= ROUNDING, build
        assert build.shared <= SHARED_MEMORY[capability], build
        assert build.tensor_cores == TENSOR_CORES[capability], build
        assert not build.serialized and not build.unfenced, build


def test_a_build_that_the_assembler_serialises_is_seen():
    """With 128 registers a thread every wgmma would wait."""
    build = ahead_of_time.compile_build(90, "bf16", 128, Configuration(128, 8, 4, maxnreg=128))
    assert build.serialized and build.spills


def test_loops_without_a_proxy_fence_are_seen():
    loop = "$L__BB0_1:\n cp.async.cg.shared.global [a], [b];\n{fence}\n wgmma.mma_async.sync;\n @%p1 bra $L__BB0_1;"
    assert ahead_of_time.unfenced_loops(loop.format(fence="")) == 1
    assert ahead_of_time.unfenced_loops(loop.format(fence=" fence.proxy.async.shared::cta;")) == 0
    assert ahead_of_time.unfenced_loops(loop.replace("wgmma", "mma").format(fence="")) == 0


@pytest.mark.parametrize("capability", [89, 120])
def test_builds_for_cards_with_little_shared_memory_fit(capability):
    for head_dim in (64, 128, 256):
        build = ahead_of_time.compile_build(capability, "bf16", head_dim)
        assert build.shared <= 99 << 10 and build.spills <= ROUNDING, build


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_builds_of_the_estimate_spill_nothing_fit_and_use_the_tensor_cores(capability, head_dim):
    for build in ahead_of_time.compile_estimate(capability, "bf16", head_dim):
        assert build.spills <= ROUNDING, build
        assert build.shared <= SHARED_MEMORY[capability], build
        assert build.tensor_cores == TENSOR_CORES[capability], build


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_the_kernel_that_joins_parts_spills_nothing(capability):
    for head_dim in HEAD_DIMS:
        build = ahead_of_time.compile_merge(capability, "bf16", head_dim)
        assert build.spills == 0 and build.shared <= SHARED_MEMORY[capability], build


@pytest.mark.parametrize("head_dim, rank", [(128, 8), (256, 42), (64, 16)])
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_builds_of_the_choice_spill_nothing_fit_and_use_the_tensor_cores(capability, head_dim, rank):
    for build in ahead_of_time.compile_choice(capability, "bf16", head_dim, rank):
        assert build.spills <= ROUNDING, build
        assert build.shared <= SHARED_MEMORY[capability], build
        multiplies = build.kernel not in ("asked_side_by_side", "picked_keys")
        assert build.tensor_cores == (TENSOR_CORES[capability] if multiplies else "no tensor cores"), build
        assert not build.serialized and not build.unfenced, build


@pytest.mark.parametrize("capability, cache", ahead_of_time.FP8_CACHES)
def test_builds_for_a_cache_of_fp8(capability, cache):
    for build in ahead_of_time.compile_for_fp8(capability, cache, 128):
        assert build.spills <= ROUNDING, build
        assert build.shared <= SHARED_MEMORY[capability], build
        assert build.tensor_cores == TENSOR_CORES[capability], build
        assert not build.serialized and not build.unfenced, build


def test_the_scan_has_few_instructions_for_a_score():
    """Four warps decide 64 keys for 4 heads of 64 rows, 128 scores a lane: less than one minimum for each."""
    loop = ahead_of_time.scan_loop(8)
    assert loop["HGMMA"] == 2 and loop["VIMNMX"] + loop["VIMNMX3"] < 100
    assert sum(loop.values()) < 1.8 * 128


def test_the_loop_that_multiplies_is_found():
    sass = """
.L_x_0:
        /*0000*/                   LDG.E R1, [R2] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ ;
.L_x_2:
        /*0030*/              @!P1 IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""
    assert ahead_of_time.loop_instructions(sass) == {"HGMMA": 1, "IMAD": 1, "BRA": 1}


def test_a_head_dim_without_a_build_is_refused():
    with pytest.raises(ValueError, match=r"head_dim: expected one of \(64, 96, 128, 256\).*got 80"):
        configuration(80, 90)

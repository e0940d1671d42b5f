"""The fence that older Tritons leave out: put into kernels that the Triton of these tests makes, without its own."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import triton
from triton import knobs

from sglang_mminfer.kernels.triton import ahead_of_time, fences
from sglang_mminfer.kernels.triton.tile_attention import tile_attention

pytestmark = pytest.mark.skipif(not fences.triton_writes_fences(), reason="needs a Triton that writes fences")

LOOPS = 3  # over full, partial and gathered tiles


def without_fences(*given: Any) -> tuple[str, str] | None:
    """A hook that makes the compiler an older one; without arguments it is asked for keys of the caches."""
    if not given:
        return "without fences", "without fences"
    stages: dict[str, Callable[..., str]] = given[1]
    write = stages["ptx"]
    stages["ptx"] = lambda *of: re.sub(r"^.*fence\.proxy\.async.*\n", "", write(*of), flags=re.MULTILINE)
    return None


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0+git1"])
def test_an_older_triton_gets_its_fences(version, capability, monkeypatch, tmp_path):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", without_fences)
    assert ahead_of_time.compile_build(capability, "bf16", 128).unfenced >= LOOPS

    monkeypatch.setattr(triton, "__version__", version)
    assert fences.fenced(tile_attention) is tile_attention
    build = ahead_of_time.compile_build(capability, "bf16", 128)
    assert build.unfenced == 0 and build.spills == 0 and not build.serialized
    assert ahead_of_time.compile_merge(capability, "bf16", 128).unfenced == 0


def test_a_triton_that_writes_fences_is_left_alone():
    before = knobs.runtime.add_stages_inspection_hook
    fences.fenced(tile_attention)
    assert knobs.runtime.add_stages_inspection_hook is before


def test_kernels_that_need_none_are_left_alone():
    ptx = "\tcp.async.wait_group 2;\n\tbar.sync 0;\n\tmma.sync.aligned.m16n8k16;\n"
    assert fences.with_fences(ptx) == ptx

"""The fence that Triton 3.6 leaves out: put into kernels that the Triton of these tests makes, without its own."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import triton
from triton import knobs

from sglang_mminfer.kernels.triton import ahead_of_time, fences
from sglang_mminfer.kernels.triton.tile_attention import tile_attention

pytestmark = pytest.mark.skipif(triton.__version__ < "3.7", reason="an older Triton's cache knows of no hooks")

LOOPS = 3  # over full, partial and gathered tiles


def without_fences(backend: Any, stages: dict[str, Callable[..., str]], *rest: Any) -> None:
    write = stages["ptx"]
    stages["ptx"] = lambda *given: re.sub(r"^.*fence\.proxy\.async.*\n", "", write(*given), flags=re.MULTILINE)


def hooked(name: str, change: Callable[..., None]) -> Callable[..., Any]:
    """The hook as later releases of Triton call it: without arguments for a key of their cache."""
    return lambda *given: change(*given) if given else (name, name)


@pytest.mark.parametrize("capability", [90, 100])
def test_an_older_triton_gets_its_fences(capability, monkeypatch, tmp_path):
    runtime = knobs.runtime
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(runtime, "add_stages_inspection_hook", hooked("as written", without_fences))
    assert ahead_of_time.compile_build(capability, "bf16", 128).unfenced >= LOOPS

    monkeypatch.setattr(runtime, "add_stages_inspection_hook", without_fences)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert fences.fenced(tile_attention) is tile_attention
    monkeypatch.setattr(runtime, "add_stages_inspection_hook", hooked("mended", runtime.add_stages_inspection_hook))
    build = ahead_of_time.compile_build(capability, "bf16", 128)
    assert build.unfenced == 0 and build.spills == 0 and not build.serialized


def test_a_triton_that_writes_fences_is_left_alone():
    before = knobs.runtime.add_stages_inspection_hook
    fences.fenced(tile_attention)
    assert knobs.runtime.add_stages_inspection_hook is before


def test_kernels_that_need_none_are_left_alone():
    ptx = "\tcp.async.wait_group 2;\n\tbar.sync 0;\n\tmma.sync.aligned.m16n8k16;\n"
    assert fences.with_fences(ptx) == ptx

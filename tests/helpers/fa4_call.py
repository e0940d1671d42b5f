"""Calls a compiled forward of flash-attn-4 as the executor does, on a machine without a GPU. Run as a program.

The tensors are in the host's memory and say that they are on a GPU. So the function checks them all, as it would there;
then it wants to launch, and finds no driver.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import tvm_ffi
from torch.utils.dlpack import to_dlpack

from sglang_mminfer import AShape, Grid
from sglang_mminfer.kernels.fa4 import forward
from sglang_mminfer.kernels.fa4.arguments import call_arguments, keys_of, queries_of
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation

KDL_CUDA, DEVICE_TYPE_OFFSET = 2, 8  # DLDeviceType, and where a DLTensor has it: after its data pointer

_tensor_in = ctypes.pythonapi.PyCapsule_GetPointer
_tensor_in.restype, _tensor_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class SaysCuda:
    """A tensor for DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        capsule = to_dlpack(self.tensor)
        ctypes.c_int32.from_address(_tensor_in(capsule, b"dltensor") + DEVICE_TYPE_OFFSET).value = KDL_CUDA
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return KDL_CUDA, 0


def on_gpu(x: Any) -> Any:
    """The argument with every tensor in it as if on a GPU."""
    if isinstance(x, torch.Tensor):
        return tvm_ffi.from_dlpack(SaysCuda(x))
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(on_gpu, x))
    return type(x)(map(on_gpu, x)) if isinstance(x, (list, tuple)) else x


def main() -> None:
    capability, gathered = int(sys.argv[1]), sys.argv[2] == "gathered"
    kind = forward.Kind(capability, torch.bfloat16, 128, 64, gathered)
    chat = conversation(40, (5, 4, 5), 30, (1, 4, 5), 24)
    heads = [AShape(16, 40), Grid("frame", True, True, True, 3, 8, 24)] * 4
    q, k, v = (torch.randn(n, h, 128).bfloat16() for n, h in ((chat.length, 8), (300, 2), (300, 2)))
    plan = BatchPlanner([RequestChunk(chat, 0, chat.length, 0, torch.arange(chat.length))], len(q)).plan(heads)
    arguments = call_arguments(plan, 4, 2, kind.pairs, gathered)
    rows, (k, v) = queries_of(q, arguments), (keys_of(cache, arguments, gathered) for cache in (k, v))

    compiled: list[forward.Kind] = []
    compile_kind = forward.compile_kind

    def counted(kind: forward.Kind) -> Any:
        compiled.append(kind)
        return compile_kind(kind)

    forward.compile_kind = counted
    function = forward.compiled(kind)
    print("compiled" if compiled else "kept")
    forward.compiled = lambda kind: lambda *given: function(*map(on_gpu, given))
    try:
        forward.call(kind, rows, k, v, arguments, 0.1, torch.empty_like(rows), torch.empty(rows.shape[:2]))
    except RuntimeError as error:
        if "cudaErrorInsufficientDriver" not in str(error):
            raise
        print("called")


if __name__ == "__main__":
    main()

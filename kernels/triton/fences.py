"""The proxy fence that Triton before 3.7.1 leaves out, put in after Triton has written a kernel's PTX.

On Hopper and Blackwell the matrix unit reads shared memory through another proxy than the threads that copy into it,
and sees what cp.async copied only after a `fence.proxy.async`. Triton 3.6 and 3.7.0 have none in a pipelined loop
(triton-lang/triton 9610), so a product may now and then read what was there before. SGLang's releases bring Triton
3.7.1 or later. With torch 2.11, on which the wrapper and the benchmarks run, it is 3.6.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import triton

FENCE = "\tfence.proxy.async.shared::cta;\n"

Kernel = TypeVar("Kernel", bound=Any)


def triton_writes_fences() -> bool:
    """Whether this Triton puts fences into loops by itself."""
    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) >= (3, 7, 1)


def fenced(kernel: Kernel) -> Kernel:
    """Decorates a kernel that multiplies: its builds have the fences, whichever Triton makes them."""
    if not triton_writes_fences():
        _mend_builds_of(kernel.fn.__name__)
    return kernel


def with_fences(ptx: str) -> str:
    """The same kernel with a fence after each wait for cp.async, if it multiplies on the matrix unit of sm_90 or later.

    The thread that copied fences, before the barrier that lets the others read.
    """
    if re.search(r"wgmma\.mma_async|tcgen05\.mma", ptx) is None:
        return ptx
    return re.sub(r"^.*\bcp\.async\.wait_(?:group|all)\b.*\n", lambda wait: wait[0] + FENCE, ptx, flags=re.MULTILINE)


def _mend_builds_of(name: str) -> None:
    """Hooks into the compiler, behind whoever did so before, and changes nothing of other kernels."""
    from triton import knobs

    others = knobs.runtime.add_stages_inspection_hook

    def change_stages(*given: Any) -> tuple[str, str] | None:
        """What Triton 3.7 asks for without arguments goes into the keys of its caches."""
        if not given:
            key, digest = others() if others is not None else ("", "")
            return f"{key} {name} is fenced", f"{digest} {name} is fenced"
        if others is not None:
            others(*given)
        stages: dict[str, Callable[..., str]] = given[1]
        if (write := stages.get("ptx")) is not None:
            stages["ptx"] = lambda source, metadata: mended(write(source, metadata), metadata["name"])
        return None

    def mended(ptx: str, of: str) -> str:
        return with_fences(ptx) if of == name else ptx

    knobs.runtime.add_stages_inspection_hook = change_stages

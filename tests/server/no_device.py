"""What SGLang asks of a GPU's driver, without a GPU: a plugin for SGLang, so that its LoRA, HiCache and PD
disaggregation run on a CPU.

Page-locked memory is memory, HiCache's copy between its pools is an indexed copy, and what SGLang tells NIXL of a KV
pool on a device holds for one in host memory. `install` makes a distribution of the plugin, which a server finds on its
PYTHONPATH.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import probe

MAKERS = ("empty", "zeros", "ones", "full", "arange", "tensor", "empty_like", "zeros_like")
"""The functions of torch that take `pin_memory`. The method of tensors is that of the CPU platform already."""


def install(folder: Path) -> str:
    """Makes the distribution in `folder`. Returns the PYTHONPATH of a server that loads the plugin."""
    return probe.distribution(folder, "no_device")


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in MAKERS:
        setattr(torch, name, unpinned(getattr(torch, name)))
    common = "sglang.srt.mem_cache.pool_host.common"
    HookRegistry.register(f"{common}._cuda_host_register", lambda *args, **kwargs: None, HookType.REPLACE)
    HookRegistry.register("sglang.srt.mem_cache.kv_cache_builder.build_kv_cache", pools, HookType.BEFORE)
    if importlib.util.find_spec("nixl"):
        HookRegistry.register("nixl._api.nixl_agent.__init__", device_memory_is_host_memory, HookType.AFTER)


def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made


def pools(*args: Any, **kwargs: Any) -> None:
    """BEFORE build_kv_cache: a copy of rows for HiCache's pool of keys and values, which may be in the last memory."""
    from sglang.srt.mem_cache.pool_host import base, mha

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # 10 GB, on a machine that has 24 and runs other servers
    mha.transfer_kv_direct = copy_rows


def copy_rows(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def device_memory_is_host_memory(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER nixl_agent.__init__."""
    self.nixl_mems["VRAM"] = self.nixl_mems["DRAM"]

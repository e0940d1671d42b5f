"""An out-of-tree SGLang platform for machines without an accelerator.

Stock SGLang has two platforms for such a machine, and neither serves a model: its CPU engine needs a kernel package
that is not on the package index, and in its base platform RoPE imports another serving engine. An out-of-tree platform
whose device is the CPU runs every operator's plain torch method instead.

This platform is used only if the user asks for the CPU: a machine that lost its GPUs fails as it does without this
package, and another vendor's platform stays in use. There are two ways to ask. SGLANG_PLATFORM=mminfer_cpu is SGLang's
own way and works through the entry point (`activate`). A device of "cpu" in the server arguments (from the command
line, a file or Engine(device="cpu")) is known only when SGLang resolves them, long after it chose a platform. `use`
then switches this process to the platform, and sets SGLANG_PLATFORM for the processes that it starts.

Importing this module costs nothing, because SGLang imports it on every machine.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mminfer import releases
from sglang_mminfer.serving import hooks
from sglang_mminfer.serving.hooks import Hook

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PLATFORM_NAME = "mminfer_cpu"
"""The entry point's name in group `sglang.srt.platforms`; SGLANG_PLATFORM with this value forces the platform."""

MAX_TOTAL_TOKENS = 262_144
"""Default size of the KV pool, in tokens. SGLang would fill most of the machine's memory: for a small model these are
tens of millions of slots, whose bookkeeping alone takes seconds and gigabytes."""

MAX_RUNNING_REQUESTS = 64
"""Default number of rows in the request table. SGLang's minimum of 2048 takes 250 MB or more if the context is long."""

MAX_RECURRENT_STATES = 4 * MAX_RUNNING_REQUESTS
"""Default number of recurrent states of a hybrid model that are kept, for running requests and cached prefixes. SGLang
would fill half of the machine's memory with them."""

SPECULATIVE_ALGORITHM = "EAGLE3"
"""The speculative decoding that runs here."""

MEMORY_SHARE = 0.8
"""The share of free memory that all ranks of this machine may use for weights and KV, taken together."""

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The file with the bytes that this container may use, or "max": cgroup v2's. Other systems lack it."""

_CORES = "SGLANG_CPU_OMP_THREADS_BIND"
_CONVOLUTION_DTYPE = "SGLANG_MAMBA_CONV_DTYPE"


@functools.cache
def accelerators() -> tuple[str, ...]:
    """The kinds of accelerators that torch can use here; empty on a machine that needs this platform."""
    import torch

    kinds = []
    if torch.cuda.is_available():
        kinds.append("hip" if torch.version.hip is not None else "cuda")
    if torch.xpu.is_available():
        kinds.append("xpu")
    for name in ("npu", "musa", "hpu", "mps"):  # a vendor's package adds these to torch, except mps
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            kinds.append(name)
    return tuple(kinds)


def selected(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SGLANG_PLATFORM names this platform."""
    return environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def activate() -> str | None:
    """Entry point: the platform's class if SGLANG_PLATFORM names it, else None."""
    return f"{__name__}.MMInferCpuPlatform" if selected() else None


def why_unfit(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why a device of "cpu" does not bring this platform, in words; None if it does."""
    if selected(environ):
        return None
    if name := environ.get("SGLANG_PLATFORM"):
        return f"SGLANG_PLATFORM={name} selects another platform"
    if environ.get("SGLANG_USE_CPU_ENGINE", "0") not in ("", "0"):
        return "SGLANG_USE_CPU_ENGINE is set, so SGLang's own CPU engine is used"
    allowed = environ.get("SGLANG_PLUGINS")
    if allowed and PLATFORM_NAME not in (name.strip() for name in allowed.split(",")):
        return f"SGLANG_PLUGINS={allowed} leaves it out"
    if kinds := accelerators():
        return f"this machine has an accelerator ({', '.join(kinds)}); SGLANG_PLATFORM={PLATFORM_NAME} insists"
    from sglang.srt.platforms import current_platform

    if current_platform.is_out_of_tree() and not is_active():
        return f"the platform {type(current_platform).__name__} of another package is active"
    return None


@functools.cache
def _platform_class() -> type:
    """The platform's class, made when SGLang asks for it.

    A class statement at module level would import SGLang's platform package. That package looks for platforms while
    it is imported, and would find this module only half imported.
    """
    import psutil
    import torch
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class MMInferCpuPlatform(releases.platform_pools(), CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
        """The CPU as an out-of-tree device: plain torch operators, gloo, no graphs, no pinned memory."""

        # OOT and not CPU: `is_cpu()` stands for SGLang's CPU engine with its own kernels, so it must stay False.
        _enum = PlatformEnum.OOT
        capabilities = releases.platform_capabilities()

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def get_device(self, device_id: int = 0) -> str:
            return "cpu"  # the interface says str, although the in-tree CPU platform returns a torch.device

        def get_device_total_memory(self, device_id: int = 0) -> int:
            """The machine's memory in bytes, or this container's limit if it has a lower one."""
            total = int(psutil.virtual_memory().total)
            try:
                return min(total, int(CONTAINER_LIMIT.read_text()))
            except (OSError, ValueError):  # no cgroup v2 here, or "max"
                return total

        def supports_speculative_algorithm(self, algorithm: str) -> bool:
            return algorithm == SPECULATIVE_ALGORITHM

        def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
            from sglang_mminfer.serving import cpu_speculative

            return cpu_speculative.slots

        def is_pin_memory_available(self, device: Any = None) -> bool:
            return False

        def get_compile_backend(self, mode: str | None = None) -> str:
            return "eager"

        def get_torch_profiler_activity_str(self) -> str:
            return "CPU"

        def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
            return torch.profiler.ProfilerActivity.CPU

    return MMInferCpuPlatform


def __getattr__(name: str) -> Any:
    if name == "MMInferCpuPlatform":
        return _platform_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_active() -> bool:
    """Whether SGLang runs on this platform in this process."""
    from sglang.srt import platforms

    return isinstance(platforms.current_platform, _platform_class())


_before: Any = None
"""The platform that SGLang had chosen before `use`; None if `use` has not changed it."""

_in_fp32 = False
"""Whether `_CONVOLUTION_DTYPE` was set here, and not by the user."""


def use() -> None:
    """Switches this process, and the processes that it starts, to this platform.

    Modules that imported SGLang's platform object by name get the new one, too.
    """
    global _before
    from sglang.srt import platforms

    os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
    if not is_active():
        _before = platforms.current_platform
        _change(_before, _platform_class()())
    hooks.install("cpu")


def leave() -> None:
    """Undoes `use` for a later engine in this process whose arguments do not ask for the CPU."""
    global _before, _in_fp32
    if _before is None:
        return
    from sglang.srt import platforms

    del os.environ["SGLANG_PLATFORM"]
    if _in_fp32:
        os.environ.pop(_CONVOLUTION_DTYPE, None)
        _in_fp32 = False
    _change(platforms.current_platform, _before)
    _before = None


def _change(old: Any, new: Any) -> None:
    from sglang.srt import platforms

    platforms._current_platform = new
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("current_platform") is old:
            module.current_platform = new  # type: ignore[attr-defined]


def _ranks(cfg: Any) -> int:
    """The number of scheduler processes on this machine."""
    return max(1, cfg.tp_size * cfg.pp_size * cfg.dp_size // max(1, cfg.nnodes))


def default_arguments(cfg: Any) -> dict[str, Any]:
    """Values for the server arguments that a CPU needs and that the user left open; {} if the device is not the CPU.

    Args:
        cfg: any view of ServerArgs.
    """
    if cfg.device is not None and cfg.device != "cpu":
        return {}
    defaults: dict[str, tuple[Any, Any]] = {  # field: (its value if the user left it open, our value)
        "device": (None, "cpu"),
        "dtype": ("auto", "float32"),
        "attention_backend": (None, "torch_native"),
        "mm_attention_backend": (None, "sdpa"),
        "sampling_backend": (None, "pytorch"),
        "disable_cuda_graph": (False, True),
        "sleep_on_idle": (False, True),  # an idle scheduler would poll, on a core that others need
        "mem_fraction_static": (None, round(MEMORY_SHARE / _ranks(cfg), 3)),
        "max_total_tokens": (None, MAX_TOTAL_TOKENS),
        "max_running_requests": (None, MAX_RUNNING_REQUESTS),
        "max_mamba_cache_size": (None, MAX_RECURRENT_STATES),
    }
    return {field: value for field, (unset, value) in defaults.items() if getattr(cfg, field) == unset}


def can_speculate(cfg: Any) -> bool:
    """Whether the speculative decoding that a launch asks for runs on a CPU, as far as the arguments tell.

    Args:
        cfg: a view of ServerArgs with a speculative algorithm.
    """
    if str(cfg.speculative_algorithm).upper() != SPECULATIVE_ALGORITHM or hooks.lacking("serving.cpu_speculative:"):
        return False
    return cfg.speculative_eagle_topk in (None, 1) and not cfg.enable_multi_layer_eagle


def core_binding(ranks: int, nodes: int, cores: list[int]) -> str | None:
    """The value of SGLANG_CPU_OMP_THREADS_BIND: the cores of each rank. None if SGLang needs none.

    By default SGLang gives each rank a NUMA node, and stops if there are more ranks than nodes.

    Args:
        ranks: the number of scheduler processes on this machine.
        nodes: the number of NUMA nodes.
        cores: the cores that this process may use.
    """
    if ranks <= nodes:
        return None
    share = max(1, len(cores) // ranks)
    groups = [cores[(i * share) % len(cores) :][:share] for i in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def resolve_defaults(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook: uses the platform if the arguments ask for the CPU, and declares `default_arguments`.

    Also binds ranks to cores where SGLang could not, and has states of convolutions kept in the model's dtype.
    """
    global _in_fp32
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    if cfg.device == "cpu":
        if reason := why_unfit():
            logger.info("mminfer: the CPU platform of this package is not used: %s.", reason)
        else:
            use()
    elif _before is not None:
        leave()
        if cfg.device is None:  # SGLang's next step needs a device: its own get_device names one, or raises
            from sglang.srt.utils import common

            declare_resolution(server_args, __name__, device=inspect.unwrap(common.get_device)())
    if is_active():
        if defaults := default_arguments(cfg):
            declare_resolution(server_args, f"platform:{PLATFORM_NAME}", **defaults)
        if cfg.dtype in ("float32", "float") and _CONVOLUTION_DTYPE not in os.environ:
            # SGLang keeps the last inputs of a convolution in bf16, whatever the model's dtype is.
            os.environ[_CONVOLUTION_DTYPE] = "float32"  # inherited by the schedulers
            _in_fp32 = True
        if cfg.device == "cpu" and _CORES not in os.environ:
            from sglang.srt.utils.common import get_cpu_ids_by_node

            cores = sorted(os.sched_getaffinity(0))
            if binding := core_binding(_ranks(cfg), len(get_cpu_ids_by_node()), cores):
                logger.info("mminfer: %s=%s (cores of each rank)", _CORES, binding)
                os.environ[_CORES] = binding  # inherited by the schedulers, where SGLang reads it
    previous(server_args)


def pin_memory(original: Callable[..., torch.Tensor], self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AROUND torch.Tensor.pin_memory: without an accelerator there is nothing to pin memory for.

    SGLang's video decoder and the processors of Qwen, Ernie and others pin every frame unless SGLang runs its own CPU
    engine, and torch raises. All of them call this method.
    """
    return original(self, *args, **kwargs) if accelerators() else self


def get_device(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """AROUND get_device: "cpu" if our platform is active, or was active for an earlier engine of this process."""
    return "cpu" if is_active() or not accelerators() else original(*args, **kwargs)


def keeps_states_in_steps(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """AROUND supports_mamba_cache_extra_buffer: False on our platform.

    SGLang then caches recurrent states where requests and chunks end. The other way, which it prefers elsewhere, caches
    them every few tokens.
    """
    return not is_active() and original(*args, **kwargs)


def supports_triton(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """AROUND support_triton: no on this platform."""
    return not is_active() and original(*args, **kwargs)


def image_processor_device(original: Callable[..., str | None], *args: Any, **kwargs: Any) -> str | None:
    """AROUND _fast_image_processor_device: None on this platform, which leaves a processor where its input is."""
    return None if is_active() else original(*args, **kwargs)


_OPERATOR = "SGLang has this operator of speculative decoding in Triton or CUDA, which need an accelerator."
_DRAFT_BACKENDS = "SGLang has a list of the backends on which a draft model may run, without the one for a CPU."

HOOKS: tuple[Hook, ...] = (
    Hook(
        "torch.Tensor.pin_memory",
        "around",
        f"{__name__}:pin_memory",
        "SGLang's video decoder and several processors pin frames unless its own CPU engine runs, and torch "
        "raises where there is no accelerator. All of them go through this method.",
        when=("cpu",),
    ),
    Hook(
        "sglang.srt.utils.common.get_device",
        "around",
        f"{__name__}:get_device",
        "SGLang names a device only for its own CPU engine or an accelerator and raises elsewhere; InternVL's "
        "processor and the Transformers fallback ask for it.",
        when=("cpu",),
    ),
    Hook(
        "sglang.srt.utils.common.support_triton",
        "around",
        f"{__name__}:supports_triton",
        "Up to 0.5.21 SGLang answers by the name of the attention backend alone, and ours is not among those without.",
        when=("cpu",),
    ),
    Hook(
        "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor._fast_image_processor_device",
        "around",
        f"{__name__}:image_processor_device",
        "0.5.20 processes images on a CUDA device wherever its own CPU engine does not run.",
        when=("cpu",),
    ),
    Hook(
        "sglang.srt.layers.attention.vision.VisionSdpaAttention.forward",
        "around",
        "sglang_mminfer.serving.cpu_vision:attend_by_sequence",
        "SGLang's vision attention on a CPU masks all patches by all patches: memory grows with the square of "
        "the video's length, and a long video ends the scheduler.",
        when=("cpu",),
    ),
    Hook(
        "sglang.srt.arg_groups.overrides.supports_mamba_cache_extra_buffer",
        "around",
        f"{__name__}:keeps_states_in_steps",
        "SGLang would choose a way of caching recurrent states whose copies Triton makes.",
        when=("cpu",),
    ),
    *(
        Hook(
            f"sglang.kernels.ops.{operator}",
            "around",
            f"sglang_mminfer.serving.cpu_delta_net:{function}",
            "SGLang has this operator of gated delta nets, of gated attention or of a gated expert in Triton, which "
            "needs an accelerator.",
            when=("cpu",),
            formerly=f"sglang.kernels.ops.{formerly[0]}" if formerly else "",
        )
        for operator, function, *formerly in (
            (
                "attention.linear.fused_gdn_gating.fused_gdn_gating",
                "gates",
                "attention.fla.fused_gdn_gating.fused_gdn_gating",  # up to 0.5.22
            ),
            ("mamba.causal_conv1d_triton.causal_conv1d_fn", "convolve"),
            ("mamba.causal_conv1d_triton.causal_conv1d_update", "convolve_token"),
            ("attention.fla.chunk.chunk_gated_delta_rule", "prefill"),
            ("attention.fla.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode", "decode"),
            ("attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous", "split_projections"),
            ("attention.fla.layernorm_gated.layernorm_fn", "gated_norm"),
            ("elementwise.elementwise.fused_sigmoid_mul", "gate_output"),
            ("elementwise.elementwise.fused_gate_sigmoid_mul_add", "add_gated"),
        )
    ),
    *(
        Hook(
            f"sglang.{target}",
            "around",
            f"sglang_mminfer.serving.cpu_speculative:{function}",
            reason,
            when=("cpu",),
            since="0.5.23",
        )
        for target, function, reason in (
            ("srt.mem_cache.allocation.assign_req_to_token_pool_func", "note_slots", _OPERATOR),
            ("srt.mem_cache.allocation.get_last_loc", "last_slots", _OPERATOR),
            ("kernels.ops.speculative.cache_locs.assign_draft_cache_locs_contiguous_func", "draft_slots", _OPERATOR),
            ("kernels.ops.speculative.spec_tree.build_tree_kernel_efficient_func", "build_chain", _OPERATOR),
            ("kernels.ops.speculative.spec_tree.verify_tree_greedy_func", "verify_chain", _OPERATOR),
            ("kernels.ops.speculative.eagle.fill_bonus_tokens_func", "last_accepted", _OPERATOR),
            (
                "srt.speculative.spec_utils.select_top_k_tokens",
                "select",
                "SGLang compiles a part of this, which takes a C++ compiler and half a minute.",
            ),
            (
                "srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
                "moves_nothing",
                "For speculative decoding SGLang tries out a Triton kernel that moves keys and values of trees.",
            ),
            (
                "srt.speculative.eagle_utils._verify_uses_greedy",
                "verifies_greedily",
                "SGLang has kernels for an accelerator alone that verify drafts by sampling.",
            ),
            (
                "srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
                "attend",
                "SGLang's backend for a CPU knows no batch that verifies drafts.",
            ),
            ("srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend", "draft_steps", _DRAFT_BACKENDS),
            (
                "srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend",
                "draft_extend",
                _DRAFT_BACKENDS,
            ),
        )
    ),
)

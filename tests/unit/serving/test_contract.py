"""What this package relies on in SGLang, checked against the installed version. A failure names the fault in words.

A new SGLang version should fail here first. A failing row names what is missing and which files of ours rely on it.
If a file relies on something new, add a row. Other tests check how these things behave. What `releases` finds in every
release has its tests in tests/unit/test_releases.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sglang_mminfer.plugin as plugin
from sglang_mminfer.serving import cpu_platform
from sglang_mminfer.serving.hooks import Hook
from sglang_versions import skip_before

ROOT = Path(__file__).parents[3]

ATTENTION = "sglang.srt.layers.attention"
ARGS = "sglang.srt.arg_groups"
BATCH = "sglang.srt.model_executor.forward_batch_info"
POOL = "sglang.srt.mem_cache.memory_pool"
SCHEDULE = "sglang.srt.managers.schedule_batch"

FUNCTIONS = ("before", "after", "around")

CALLABLES: list[tuple[str, tuple[str, ...]]] = [
    # (what, parameters that we pass by these names or rely on, in this order)
    (
        f"{ATTENTION}.base_attn_backend.AttentionBackend.init_forward_metadata",
        ("self", "forward_batch"),
    ),
    (
        f"{ATTENTION}.base_attn_backend.AttentionBackend.init_forward_metadata_out_graph",
        ("self", "forward_batch"),
    ),
    (
        f"{ATTENTION}.base_attn_backend.AttentionBackend.forward_extend",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
    ),
    (
        f"{ATTENTION}.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
    ),
    (f"{POOL}.MHATokenToKVPool.set_kv_buffer", ("self", "layer", "loc_info", "cache_k", "cache_v")),
    (f"{POOL}.MHATokenToKVPool.get_kv_buffer", ("self", "layer_id")),
    (f"{BATCH}.ForwardMode.is_decode_or_idle", ("self",)),
    (f"{BATCH}.ForwardMode.is_target_verify", ("self",)),
    (f"{BATCH}.ForwardBatch.init_new", ("batch", "model_runner")),
    ("sglang.srt.managers.cache_controller.storage_model_name", ("model_name", "host_pool")),
    ("sglang.srt.runtime_context.get_parallel", ()),
    ("sglang.srt.runtime_context.get_platform", ()),
    (
        f"{ARGS}.model_override_base.get_default_attn_backend",
        ("server_args", "use_mla_backend", "model_config"),
    ),
    (f"{ARGS}.model_override_base.model_config_of", ("server_args",)),
    (f"{ARGS}.model_override_base.use_mla_backend", ("server_args",)),
    (f"{ARGS}.model_override_base.resolving_view", ("server_args",)),
    (f"{ARGS}.overrides.attention_backends_of", ("cfg",)),
    (f"{ARGS}.overrides.declare_resolution", ("server_args", "source", "fields")),
    (f"{ARGS}.overrides.record_of", ("view",)),
    (f"{ARGS}.resolution_hooks.register_resolution_hook", ("name",)),
    ("sglang.srt.configs.hybrid_arch.mambaish_config", ("model_config",)),
    ("sglang.srt.configs.hybrid_arch.hybrid_gdn_config", ("model_config",)),
    (f"{ATTENTION}.attention_registry.attn_backend_wrapper", ("runner", "full_attn_backend")),
    (f"{ATTENTION}.qsa.config.is_qwen_qsa", ("config",)),
    ("sglang.srt.configs.model_config.is_minimax_sparse", ("config",)),
    ("sglang.srt.managers.mm_utils.get_new_expanded_mm_items", ("original_mm_items",)),
    (
        "sglang.srt.managers.mm_schedule.get_embedding_and_mask",
        (
            *("data_embedding_func", "embedding_items", "placeholder_tensor", "input_ids"),
            *("items_size", "prefix_length", "extend_length", "items_offset_list"),
        ),
    ),
    ("sglang.srt.mem_cache.multimodal_cache.MultiModalStaticCache.has", ("self", "mm_hash")),
    (
        "sglang.srt.mem_cache.multimodal_cache.MultiModalStaticCache.combine_hashes",
        ("mm_hashes",),
    ),
    ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req")),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop", ("self",)),
    ("sglang.srt.entrypoints.http_server.get_global_state", ()),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state", ("self", "obj")),
    (
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
        ("self", "obj"),
    ),
    (
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
        ("self", "request"),
    ),
    ("sglang.srt.entrypoints.engine.init_tokenizer_manager", ("server_args", "port_args")),
    ("sglang.srt.managers.schedule_batch.MultimodalInputs.from_processor_output", ("obj",)),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", ("self", "obj", "request")),
    (
        "sglang.srt.parser.template_manager.TemplateManager.initialize_templates",
        ("self", "tokenizer_manager", "model_path", "chat_template", "completion_template"),
    ),
    ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat.handle_request", ("self", "request", "raw_request")),
    ("sglang.srt.runtime_context.get_serving", ()),
    ("sglang.srt.runtime_context.publish", ("server_args", "role")),
    ("sglang.srt.plugins.load_plugins", ()),
    (
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        ("target", "hook", "hook_type"),
    ),
    ("sglang.srt.plugins.hook_registry._wrap_fn", ("original_fn", "hook", "hook_type")),
    ("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",)),
    ("sglang.srt.server_args.ServerArgs.from_cli_args", ("args",)),
    ("sglang.srt.server_args.ServerArgs.resolve_once", ("self",)),
    (
        "sglang.srt.utils.video_decoder.VideoDecoderWrapper.__init__",
        ("self", "source", "device", "num_decode_threads"),
    ),
    ("sglang.srt.utils.common.get_cpu_ids_by_node", ()),
    (
        "sglang.srt.utils.hf_transformers.config.HfModelConfigParser.parse",
        ("self", "model", "trust_remote_code", "revision", "kwargs"),
    ),
    (
        "sglang.srt.utils.hf_transformers.processor.get_processor",
        (
            "tokenizer_name",
            "tokenizer_mode",
            "trust_remote_code",
            "tokenizer_revision",
            "tokenizer_backend",
            "model_name",
        ),
    ),
    (
        "sglang.srt.utils.hf_transformers_utils.get_tokenizer",
        ("tokenizer_name", "tokenizer_mode", "trust_remote_code", "tokenizer_revision", "tokenizer_backend"),
    ),
    (
        "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor.load_mm_data",
        ("self", "prompt", "multimodal_tokens", "image_data", "video_data"),
    ),
    (
        "sglang.srt.managers.mm_utils.general_mm_embed_routine",
        ("input_ids", "forward_batch", "language_model", "data_embedding_funcs", "kwargs"),
    ),
    ("sglang.srt.runtime_context.get_model", ()),
    (
        "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor.get_mm_items_offset",
        ("input_ids", "mm_token_id"),
    ),
    (
        "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor.compute_mrope_positions",
        ("self", "input_ids", "mm_items"),
    ),
    (
        "sglang.srt.multimodal.processors.base_processor.MultimodalSpecialTokens.get_token_id_by_modality",
        ("self", "modality"),
    ),
    ("sglang.srt.managers.schedule_batch.Req.set_finish_with_abort", ("self", "error_msg")),
]

OPERATORS = "sglang.kernels.ops"
CALLABLES += [
    # what serving/cpu_delta_net.py does in their place
    (f"{OPERATORS}.{operator}", parameters)
    for operator, parameters in {
        "attention.linear.fused_gdn_gating.fused_gdn_gating": ("A_log", "a", "b", "dt_bias", "beta", "threshold"),
        "mamba.causal_conv1d_triton.causal_conv1d_fn": (
            *("x", "weight", "bias", "conv_states", "query_start_loc", "seq_lens_cpu", "cache_indices"),
            *("has_initial_state", "activation"),
        ),
        "mamba.causal_conv1d_triton.causal_conv1d_update": (
            *("x", "conv_state", "weight", "bias", "activation", "cache_seqlens", "conv_state_indices"),
        ),
        "attention.fla.chunk.chunk_gated_delta_rule": (
            *("q", "k", "v", "g", "beta", "scale", "initial_state", "initial_state_indices", "cu_seqlens"),
            *("head_first", "use_qk_l2norm_in_kernel", "inplace_update"),
        ),
        "attention.fla.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode": (
            *("mixed_qkv", "a", "b", "A_log", "dt_bias", "scale", "initial_state", "out", "ssm_state_indices"),
            "use_qk_l2norm_in_kernel",
        ),
        "attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous": (
            *("mixed_qkvz", "mixed_ba", "num_heads_qk", "num_heads_v", "head_qk", "head_v"),
        ),
        "attention.fla.layernorm_gated.layernorm_fn": (
            *("x", "weight", "bias", "z", "eps", "group_size", "norm_before_gate", "is_rms_norm", "activation"),
        ),
        "elementwise.elementwise.fused_sigmoid_mul": ("attn_output", "gate", "inplace", "quant"),
        "elementwise.elementwise.fused_gate_sigmoid_mul_add": (
            *("hidden_states", "gate_weight", "shared_output", "final_hidden_states"),
        ),
    }.items()
]

PLATFORM = "sglang.srt.platforms.interface.SRTPlatform"
CALLABLES += [
    (f"{PLATFORM}.{method}", parameters)
    for method, parameters in {
        "get_default_attention_backend": ("self",),
        "get_dispatch_key_name": ("self",),
        "get_device_total_memory": ("self", "device_id"),
        "get_device": ("self", "device_id"),
        "get_compile_backend": ("self", "mode"),
        "get_torch_profiler_activity": ("self",),
        "get_torch_profiler_activity_str": ("self",),
        "is_out_of_tree": ("self",),
        "is_pin_memory_available": ("self", "device"),
    }.items()
]

ATTRIBUTES: list[tuple[str, type]] = [
    # (attribute of a module, its type)
    (f"{ATTENTION}.attention_registry.ATTENTION_BACKENDS", dict),
    (f"{ARGS}.choices.ATTENTION_BACKEND_CHOICES", list),
    (f"{ARGS}.choices.DRAFT_ATTENTION_BACKEND_CHOICES", list),
    ("sglang.srt.constants.HEALTH_CHECK_RID_PREFIX", str),
    ("sglang.srt.entrypoints.http_server.app", object),
    ("sglang.srt.environ.envs.SGLANG_WARMUP_TIMEOUT", object),
    ("sglang.srt.utils.video_decoder._BACKEND", str),
    ("sglang.srt.managers.multimodal_processor.PROCESSOR_MAPPING", dict),
    ("sglang.srt.models.registry.ModelRegistry.models", dict),
    ("sglang.srt.configs.Qwen3NextConfig", type),
    ("sglang.srt.environ.envs.SGLANG_MAMBA_CONV_DTYPE", object),
    ("sglang.srt.platforms.cpu.CpuDeviceMixin", type),
]

FIELDS: list[tuple[str, tuple[str, ...]]] = [
    # (dataclass or msgspec struct, fields that we read)
    (
        f"{BATCH}.ForwardBatch",
        (
            "forward_mode",
            "mm_inputs",
            "rids",
            "req_pool_indices",
            "extend_seq_lens_cpu",
            "extend_prefix_lens_cpu",
            "tbo_children",
            "tbo_parent_token_range",
        ),
    ),
    (
        f"{SCHEDULE}.MultimodalDataItem",
        ("modality", "offsets", "feature", "hash", "model_specific_data"),
    ),
    (f"{SCHEDULE}.MultimodalInputs", ("mm_items", "mrope_positions")),
    ("sglang.srt.managers.io_struct.GenerateReqInput", ("rid", "input_ids", "sampling_params", "routed_dp_rank")),
    ("sglang.srt.managers.io_struct.GetInternalStateReq", ("rid",)),
    ("sglang.srt.managers.io_struct.GetInternalStateReqOutput", ("internal_state",)),
    (
        f"{SCHEDULE}.MultimodalProcessorOutput",
        ("input_ids", "mm_items", "im_token_id", "video_token_id"),
    ),
    (
        "sglang.srt.model_loader.loader.DefaultModelLoader.Source",
        ("revision", "prefix", "allow_patterns_overrides"),
    ),
    (
        "sglang.srt.server_args.ServerArgs",
        (
            "attention_backend",
            "prefill_attention_backend",
            "decode_attention_backend",
            "mm_attention_backend",
            "sampling_backend",
            "attn_cp_size",
            "cuda_graph_backend_prefill",
            "cuda_graph_config",
            "dcp_size",
            "device",
            "disable_cuda_graph",
            "disable_radix_cache",
            "disaggregation_mode",
            "dllm_algorithm",
            "dp_size",
            "dtype",
            "enable_deterministic_inference",
            "enable_hisparse",
            "enable_metrics",
            "enable_mis",
            "enable_page_major_kv_layout",
            "enable_pdmux",
            "enable_prefill_cp",
            "enable_unified_memory",
            "encoder_only",
            "grpc_mode",
            "json_model_override_args",
            "kv_cache_dtype",
            "language_only",
            "linear_attn_backend",
            "load_format",
            "mamba_radix_cache_strategy",
            "max_mamba_cache_size",
            "max_running_requests",
            "max_total_tokens",
            "mem_fraction_static",
            "model_path",
            "nnodes",
            "page_size",
            "pp_size",
            "prefill_only_disable_kv_cache",
            "revision",
            "rl_on_policy_target",
            "skip_tokenizer_init",
            "smg_grpc_mode",
            "enable_multi_layer_eagle",
            "speculative_algorithm",
            "speculative_draft_attention_backend",
            "speculative_eagle_topk",
            "tokenizer_path",
            "tokenizer_worker_num",
            "tp_size",
            "use_ray",
        ),
    ),
]

SET_IN_INIT: list[tuple[str, tuple[str, ...]]] = [
    # (class, attributes that its __init__ sets and we read)
    ("sglang.srt.managers.scheduler.Scheduler", ("_mm_processor", "pad_input_ids_func")),
    (
        "sglang.srt.layers.radix_attention.RadixAttention",
        (
            "layer_id",
            "tp_q_head_num",
            "tp_k_head_num",
            "head_dim",
            "qk_head_dim",
            "v_head_dim",
            "scaling",
            "logit_cap",
            "sliding_window_size",
            "use_irope",
            "is_cross_attention",
            "attn_type",
        ),
    ),
    (f"{POOL}.ReqToTokenPool", ("req_to_token",)),
    (
        "sglang.srt.model_executor.model_runner.ModelRunner",
        (
            "server_args",
            "model_config",
            "device",
            "is_draft_worker",
            "init_new_workspace",
            "req_to_token_pool",
            "layer_info",
        ),
    ),
    (
        "sglang.srt.configs.model_config.ModelConfig",
        ("hf_config", "is_multimodal", "is_generation", "num_hidden_layers", "attention_arch", "has_asymmetric_kv"),
    ),
]


def users_of(path: str) -> str:
    """Our files that contain the last part of a dotted path."""
    name = path.rsplit(".", 1)[1]
    files = sorted(ROOT.glob("sglang_mminfer/**/*.py"))
    return ", ".join(str(file.relative_to(ROOT)) for file in files if re.search(rf"\b{name}\b", file.read_text()))


FORMERLY = {hook.target: hook.formerly for hook in plugin.HOOKS if hook.formerly}

BROUGHT = {
    # the release that brought what ours do without: a launch that needs it is refused, or the parameter is not passed
    "sglang.kernels.ops.elementwise.elementwise.fused_sigmoid_mul": "0.5.22",  # its parameter `quant`
    "get_speculative_cache_locs_fn": "0.5.21",
} | {hook.target: hook.since for hook in plugin.HOOKS if hook.since}


def skip_if_later(path: str) -> None:
    """Skip what this release of SGLang cannot have yet."""
    if path in BROUGHT:
        skip_before(BROUGHT[path])


def _find(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        if path in FORMERLY:
            return pkgutil.resolve_name(FORMERLY[path])
        pytest.fail(f"SGLang has no {path} any more ({error}). {users_of(path)} of ours stands on it.")


HELD = [row[0] for row in (*CALLABLES, *ATTRIBUTES)]
HELD += [f"{path}.{name}" for path, names in (*FIELDS, *SET_IN_INIT) for name in names]


@pytest.mark.parametrize("path", HELD)
def test_what_is_held_is_used(path: str) -> None:
    assert users_of(path), f"nothing of ours names {path} any more: drop it here"


@pytest.mark.parametrize("path, parameters", CALLABLES, ids=[row[0] for row in CALLABLES])
def test_callable_takes_what_we_pass(path: str, parameters: tuple[str, ...]) -> None:
    skip_if_later(path)
    has = list(inspect.signature(inspect.unwrap(_find(path))).parameters)
    if has and has[0] in ("cls",):
        has = has[1:]
    found = [name for name in has if name in parameters]
    assert found == list(parameters), (
        f"{path} now takes ({', '.join(has)}); {users_of(path)} expects ({', '.join(parameters)}) in this order."
    )


@pytest.mark.parametrize("path, kind", ATTRIBUTES, ids=[row[0] for row in ATTRIBUTES])
def test_attribute_is_of_its_type(path: str, kind: type) -> None:
    found = _find(path)
    assert isinstance(found, kind), (
        f"{path} is now a {type(found).__name__}; {users_of(path)} of ours expects a {kind.__name__}."
    )


@pytest.mark.parametrize("path, names", FIELDS, ids=[row[0] for row in FIELDS])
def test_record_has_the_fields_we_read(path: str, names: tuple[str, ...]) -> None:
    record = _find(path)
    fields = dataclasses.fields if dataclasses.is_dataclass(record) else msgspec.structs.fields
    missing = set(names) - {field.name for field in fields(record)}
    assert not missing, f"{path} has no {', '.join(sorted(missing))} any more; {users_of(path)} of ours reads it."


@pytest.mark.parametrize("path, names", SET_IN_INIT, ids=[row[0] for row in SET_IN_INIT])
def test_object_has_the_attributes_we_read(path: str, names: tuple[str, ...]) -> None:
    cls = _find(path)
    source = "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("sglang"))
    missing = [name for name in names if not hasattr(cls, name) and not re.search(rf"self\.{name}\b[^=\n]*=", source)]
    assert not missing, f"{path} does not set {', '.join(missing)} any more; {users_of(path)} of ours reads it."


@pytest.mark.parametrize("hook", plugin.HOOKS, ids=[hook.target for hook in plugin.HOOKS])
def test_hook_has_its_target(hook: Hook) -> None:
    skip_if_later(hook.target)
    assert hook.target_exists(), (
        f"SGLang has no place {hook.target} for a {hook.kind} hook any more; "
        f"{hook.function} stands on it. {hook.reason}"
    )
    assert callable(hook.resolve())
    assert hook.reason.endswith(".")


@pytest.mark.parametrize(
    "hook", [hook for hook in plugin.HOOKS if hook.kind in FUNCTIONS], ids=lambda hook: hook.target
)
def test_hook_knows_its_module(hook: Hook) -> None:
    """hooks.py waits for the import of this module, where it is not imported yet."""
    skip_if_later(hook.target)
    place = next(place for place in hook.at_each_place() if place.target_exists())
    assert place.target.startswith(f"{place.module}.")
    assert importlib.import_module(place.module) is sys.modules[place.module]


REPLACED = {hook.target for hook in plugin.HOOKS if hook.reason.startswith("SGLang has this operator")}
"""Operators that ours stand in for, so that every argument must be known."""


@pytest.mark.parametrize(
    "hook",
    [hook for hook in plugin.HOOKS if hook.kind in FUNCTIONS and hook.target not in REPLACED],
    ids=lambda h: h.target,
)
def test_hook_passes_on_arguments_that_it_does_not_know(hook: Hook) -> None:
    """A new parameter in SGLang is no TypeError then."""
    kinds = {parameter.kind for parameter in inspect.signature(hook.resolve()).parameters.values()}
    assert {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds, hook.function


def test_hooks_are_named_once() -> None:
    targets = [hook.target for hook in plugin.HOOKS]
    assert len(set(targets)) == len(targets)


def test_add_cli_args_is_static_and_from_cli_args_a_classmethod() -> None:
    from sglang.srt.server_args import ServerArgs

    kinds = {name: type(vars(ServerArgs)[name]) for name in ("add_cli_args", "from_cli_args")}
    assert kinds == {"add_cli_args": staticmethod, "from_cli_args": classmethod}, (
        f"ServerArgs changed how these are called: {kinds}; add_cli_args and from_cli_args of serving/flags.py "
        "take their arguments by it."
    )


def test_resolution_runs_the_steps_in_the_order_we_need() -> None:
    """CPU defaults come before the device is picked; refusals come after the CUDA graphs are known and before SGLang's
    checks by backend name."""
    from sglang.srt.arg_groups import pipeline

    source = inspect.getsource(pipeline.run_resolution_pipeline)
    steps = re.findall(r"run_hook\((\w+), server_args\)", source)
    order = [
        "handle_hardware_runtime_validation",
        "handle_missing_default_values",
        "handle_cuda_graph_config",
        "handle_gpu_memory_settings",
        "handle_model_specific_adjustments",
        "handle_deterministic_inference",
        "handle_attention_backend_compatibility",
        "handle_kv4_compatibility",
        "handle_multi_item_scoring",
        "handle_speculative_decoding",
        "handle_model_capability_adjustments",
    ]
    places = [steps.index(step) for step in order]
    assert places == sorted(places), f"SGLang resolves arguments in another order now: {steps}"


def test_the_platform_is_an_srt_platform() -> None:
    from sglang.srt.platforms.interface import SRTPlatform

    assert issubclass(cpu_platform.MMInferCpuPlatform, SRTPlatform)
    ours = [name for name in vars(cpu_platform.MMInferCpuPlatform) if name.startswith(("get_", "is_"))]
    unknown = [name for name in ours if not hasattr(SRTPlatform, name)]
    for name in unknown:
        skip_if_later(name)
    assert not unknown, f"SRTPlatform has no {unknown} any more: cpu_platform.py overrides nothing with it."


def test_mm_items_are_cleared_before_the_first_layer() -> None:
    """This is why backend.py builds its maps with the metadata."""
    from sglang.srt.managers import mm_utils

    assert "forward_batch.mm_inputs = None" in inspect.getsource(mm_utils), (
        "mm_utils no longer clears forward_batch.mm_inputs after embedding; backend.py may read it later now."
    )


def test_every_publication_of_arguments_resolves_them() -> None:
    """asked.py relies on it: a process works with the arguments that it resolved last."""
    from sglang.srt import runtime_context

    publishes = getattr(runtime_context, "_configure_context", runtime_context.publish)  # of 0.5.22, and before it
    assert "server_args.resolve_once()" in inspect.getsource(publishes)


def test_sglang_forgets_configs() -> None:
    """asked.py clears this cache if the next server of a process reads checkpoints in another way."""
    from sglang.srt.utils.hf_transformers.config import get_config

    assert callable(get_config.cache_clear)

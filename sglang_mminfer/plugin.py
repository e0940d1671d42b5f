"""The entry point, and every place where this package reaches into SGLang.

`HOOKS` lists each of those places with its reason, `REFUSALS` each launch that cannot work with what to do
instead. Nothing else in the package changes SGLang. Importing this module costs nothing: SGLang does so in
every process, and hides a plugin that fails to import behind "invalid choice: 'mminfer'".
"""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sglang_mminfer import config, mends

logger = logging.getLogger(__name__)

_HERE = __name__
_CPU = "sglang_mminfer.cpu_platform"
_MODELS = "sglang_mminfer.models.registration"


@dataclass(frozen=True)
class Hook:
    """One place where SGLang is extended or changed.

    Attributes:
        target: dotted path in SGLang; for kind "resolution" the name of a step of argument resolution.
        kind: before, after, around: SGLang's HookRegistry. resolution: its resolution hooks. choice: a name
            added to a list of choices. backend: a factory in the attention registry.
        function: `module:name` of ours, imported when the hook is installed.
        reason: why SGLang cannot do without it.
        cpu_only: installed only where our CPU platform is used.
        essential: without it answers could be wrong, so where SGLang lacks the target no server starts with mminfer.
            Others are left out with a warning.
    """

    target: str
    kind: Literal["before", "after", "around", "resolution", "choice", "backend"]
    function: str
    reason: str
    cpu_only: bool = False
    essential: bool = False

    def resolve(self) -> Callable[..., Any]:
        """Our function."""
        return pkgutil.resolve_name(self.function)

    def target_exists(self) -> bool:
        """Whether this SGLang has the place that is hooked."""
        if self.kind == "resolution":
            from sglang.srt.arg_groups.resolution_hooks import _OVERRIDABLE_HOOKS

            return self.target in _OVERRIDABLE_HOOKS
        try:
            found = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError):
            return False
        kinds = {"choice": list, "backend": dict}
        return isinstance(found, kinds[self.kind]) if self.kind in kinds else callable(found)


HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.arg_groups.choices.ATTENTION_BACKEND_CHOICES",
        "choice",
        f"{_HERE}:add_choice",
        "argparse accepts an attention backend only by this list.",
        essential=True,
    ),
    Hook(
        "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS",
        "backend",
        f"{_HERE}:create_backend",
        "The scheduler builds attention backends by name from this registry.",
        essential=True,
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "after",
        f"{_HERE}:add_cli_args",
        "The flags --mminfer-config and --mminfer-audit; SGLang has no way for a plugin to declare one.",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "around",
        f"{_HERE}:from_cli_args",
        "ServerArgs takes only its own fields from the command line; this carries the flags over.",
    ),
    Hook(
        "handle_model_specific_adjustments",
        "resolution",
        f"{_HERE}:check_launch",
        "Refuses what can never work and finds a bad head config before a process is started; names a draft "
        "backend for speculative decoding. This step is the first that knows flags, CUDA graphs and model, "
        "and comes before SGLang's own checks by backend name.",
        essential=True,
    ),
    Hook(
        "handle_model_capability_adjustments",
        "resolution",
        f"{_HERE}:check_result",
        "Some models make SGLang replace the attention backend; that must not go unseen.",
        essential=True,
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.resolve_once",
        "before",
        "sglang_mminfer.asked:note",
        "Hooks on SGLang's model code are given no arguments of the server, and must leave servers without mminfer "
        "alone. Every process resolves or publishes its arguments before, and both go through this method.",
        essential=True,
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        "sglang_mminfer.prompts:note",
        "A forward batch does not tell where a request's prompt ends and what was generated begins, and its mode does "
        "not either. The requests do, and this is the last place that has them.",
        essential=True,
    ),
    Hook(
        "sglang.srt.managers.cache_controller.storage_model_name",
        "after",
        "sglang_mminfer.config:storage_model_name",
        "Pages in HiCache's storage outlive a server and are shared between servers by the model's name, and the KV of "
        "sparse layers is another one for each head config.",
        essential=True,
    ),
    Hook(
        "sglang.srt.managers.mm_schedule.get_embedding_and_mask",
        "around",
        "sglang_mminfer.embedding_cache:watch_encoder",
        "SGLang's embedding cache silently refuses a video that is larger than the cache, and the vision encoder "
        "then runs again for every chunk: this sees it, says what to set, and counts it. Nothing else changes.",
    ),
    Hook(
        "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor.__init__",
        "after",
        "sglang_mminfer.mends.processor:mend_processor",
        "Media processors of a server with mminfer get the mends of `mends.MENDS`. In the constructor and not where "
        "classes are chosen, because only here the server's arguments are known.",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.MultimodalDataItem.set_pad_value",
        "around",
        "sglang_mminfer.mends.identity:set_pad_value",
        "SGLang hashes a medium's features alone, and two media of equal features may be arranged differently. Items "
        "of other servers lack the key that this goes by.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
        "around",
        "sglang_mminfer.mends.words:guard_messages",
        "Only before the chat template runs can words of a conversation be told from placeholders of its media.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
        "around",
        "sglang_mminfer.mends.options:carry",
        "SGLang's models of a chat part drop the options that they do not know, and its conversation templates nearly "
        "all; here the request as it came and what is made of it are both at hand.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._apply_conversation_template",
        "around",
        "sglang_mminfer.mends.order:apply_template",
        "SGLang has the conversation template of InternVL in a table, with pictures before all else of a message.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        "sglang_mminfer.mends.batches:generate_request",
        "What a request brings for one prompt can be told from what it brings for many only before SGLang makes a "
        "batch of a request that wants several answers.",
    ),
    Hook(
        "sglang.srt.session.session_controller.Session.create_req",
        "around",
        "sglang_mminfer.mends.sessions:create_request",
        "Only here a turn's prompt and the media it inherits are put together; what does not fit ends the scheduler.",
    ),
    Hook(
        "sglang.srt.session.session_controller.SessionController._close",
        "around",
        "sglang_mminfer.mends.sessions:close",
        "Closing a session frees the media of turns that still run, and the scheduler ends.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._get_multimodal_inputs",
        "around",
        "sglang_mminfer.mends.sessions:media_of",
        "What the scheduler cannot read of a request's media is the request's error, and no exception in its loop.",
    ),
    Hook(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "around",
        "sglang_mminfer.mends.requests:normalize",
        "Lists of media in lists, or too few of them, are an internal error here, and the client's by right.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
        "around",
        "sglang_mminfer.mends.aborts:begin",
        "Here alone a request's state and its client's connection are seen together.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
        "around",
        "sglang_mminfer.mends.aborts:tokenize",
        "Media are loaded inside, and SGLang looks for aborts and clients that left only when the scheduler has the "
        "request.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request",
        "around",
        "sglang_mminfer.mends.aborts:abort",
        "Every abort comes through here, and goes to the scheduler only.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "around",
        "sglang_mminfer.mends.requests:validate",
        "The last place where a request can be refused with a sentence: fields of the wrong kind end the scheduler.",
    ),
    Hook(
        "sglang.srt.model_loader.utils.get_model_architecture",
        "after",
        "sglang_mminfer.mends.models:adapt_model",
        "Faults in SGLang's models: `mends.MENDS` has them, llava_original and frames_apart.",
    ),
    Hook(
        "sglang.srt.utils.video_decoder.VideoDecoderWrapper.__init__",
        "around",
        f"{_HERE}:decode_without_ffmpeg",
        "SGLang takes decord if torchcodec cannot be imported, but torchcodec looks for FFmpeg's libraries "
        "only with the first video: without them every video request fails.",
    ),
    Hook(
        "sglang.srt.utils.hf_transformers.config.HfModelConfigParser.parse",
        "around",
        f"{_MODELS}:parse_config",
        "SGLang reads a config by its model type, and the checkpoints of `models` have one that transformers does "
        "not know (LongVILA) or takes for another model (LLaVA-Video).",
    ),
    Hook(
        "sglang.srt.utils.hf_transformers.processor.get_processor",
        "around",
        f"{_MODELS}:load_processor",
        "The same checkpoints have no processor that transformers could load.",
    ),
    Hook(
        "handle_missing_default_values",
        "resolution",
        f"{_MODELS}:resolve_tokenizer",
        "LongVILA keeps its tokenizer in a sub-folder; this step names the tokenizer's path if the user did not.",
    ),
    Hook(
        "handle_hardware_runtime_validation",
        "resolution",
        f"{_CPU}:resolve_defaults",
        "The first step that knows whether the arguments ask for the CPU; SGLang chooses a platform before. And the "
        "defaults that a CPU needs, before SGLang reads the model's dtype or picks a device; the platform's own "
        "apply_server_args_defaults comes too late for both.",
    ),
    Hook(
        "torch.Tensor.pin_memory",
        "around",
        f"{_CPU}:pin_memory",
        "SGLang's video decoder and several processors pin frames unless its own CPU engine runs, and torch "
        "raises where there is no accelerator. All of them go through this method.",
        cpu_only=True,
    ),
    Hook(
        "sglang.srt.utils.common.get_device",
        "around",
        f"{_CPU}:get_device",
        "SGLang names a device only for its own CPU engine or an accelerator and raises elsewhere; InternVL's "
        "processor and the Transformers fallback ask for it.",
        cpu_only=True,
    ),
    Hook(
        "sglang.srt.layers.attention.vision.VisionSdpaAttention.forward",
        "around",
        f"{_CPU}:attend_by_sequence",
        "SGLang's vision attention on a CPU masks all patches by all patches: memory grows with the square of "
        "the video's length, and a long video ends the scheduler.",
        cpu_only=True,
    ),
)

_registered = False

_missing: list[Hook] = []
"""Hooks whose targets this SGLang does not have. A launch with mminfer is told, and nobody else."""


def register() -> None:
    """Entry point of group `sglang.srt.plugins`: installs `HOOKS`. A second call does nothing."""
    global _registered
    if _registered:
        return
    try:
        from sglang_mminfer import cpu_platform

        on_cpu = cpu_platform.selected()
        for hook in HOOKS:
            if hook.cpu_only and not on_cpu:
                continue
            if hook.target_exists():
                _install(hook)
            else:
                _missing.append(hook)
    except Exception:
        logger.exception(
            "sglang-mminfer could NOT be registered, so SGLang will not know the attention backend "
            "'mminfer'. Run `mminfer doctor` to see what is wrong."
        )
        raise
    _registered = True


@cache
def install_cpu_hooks() -> None:
    """Installs what `register` left out, where the CPU is asked for only after it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in HOOKS:
        if hook.cpu_only and hook.target not in HookRegistry._patched:
            _install(hook)
    HookRegistry.apply_hooks()


def _install(hook: Hook) -> None:
    function = hook.resolve()
    if hook.kind == "choice":
        function(pkgutil.resolve_name(hook.target))
    elif hook.kind == "backend":
        registry = pkgutil.resolve_name(hook.target)
        registry.setdefault(config.BACKEND_NAME, function)
    elif hook.kind == "resolution":
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook(hook.target)(function)
    else:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(hook.target, function, HookType(hook.kind))


# The attention backend and its flag


def add_choice(choices: list[str]) -> None:
    if config.BACKEND_NAME not in choices:
        choices.append(config.BACKEND_NAME)


def create_backend(runner: Any) -> Any:
    """Factory in SGLang's attention registry; only here is torch code of ours imported."""
    check_installation()
    from sglang_mminfer.backend import create_backend as create

    return create(runner)


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args."""
    if config.FLAG in parser._option_string_actions:
        return
    parser.add_argument(
        config.FLAG,
        type=config.config_argument,
        default=None,
        metavar="NAME|PATH",
        help="Head config of --attention-backend mminfer: the name of a built-in one or the path of a JSON "
        f"file. Overrides {config.ENVIRONMENT} and {config.MODEL_KEY} in --json-model-override-args. "
        f"Default: {config.DEFAULT}.",
    )
    parser.add_argument(
        config.AUDIT_FLAG,
        type=config.audit_argument,
        default=None,
        metavar="RATE",
        help="Share of requests, 0 to 1, of which --attention-backend mminfer computes sampled query rows again, "
        "densely, and records error and recall of every sparse layer in trace and metrics. Answers stay the same. "
        f"Overrides {config.AUDIT_ENVIRONMENT}. Default: 0, off.",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ServerArgs.from_cli_args."""
    server_args = original(cls, args)
    setattr(server_args, config.ATTRIBUTE, getattr(args, "mminfer_config", None))
    setattr(server_args, config.AUDIT_ATTRIBUTE, getattr(args, "mminfer_audit", None))
    return server_args


# What is refused at start-up


class UnsupportedLaunch(ValueError):
    """A combination of arguments that mminfer cannot serve."""


@dataclass(frozen=True)
class Refusal:
    """A launch that can never work. `applies` gets a view of the arguments as far as they are resolved."""

    name: str
    applies: Callable[[Any], bool]
    message: str


def _backends(cfg: Any) -> tuple[str | None, str | None]:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    return attention_backends_of(cfg)


def _model_config(cfg: Any) -> Any:
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(cfg)


def _is_mla(cfg: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return _model_config(cfg).attention_arch == AttentionArch.MLA


def _has_linear_attention(cfg: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    model = _model_config(cfg)
    return model.attention_arch == AttentionArch.SSM or mambaish_config(model) is not None


def _has_own_sparse_attention(cfg: Any) -> bool:
    from sglang.srt.configs.model_config import is_minimax_sparse

    return is_minimax_sparse(_model_config(cfg).hf_config)


def _full_prefill_graph(cfg: Any) -> bool:
    resolved = getattr(cfg.cuda_graph_config, "prefill", None)
    return (resolved.backend if resolved else cfg.cuda_graph_backend_prefill) == "full"


def _draft_backend(cfg: Any) -> str | None:
    """The dense backend if a draft model could run on it, else None."""
    from sglang.srt.arg_groups.choices import DRAFT_ATTENTION_BACKEND_CHOICES
    from sglang.srt.arg_groups.overrides import record_of

    name = config.dense_backend_name(record_of(cfg), cfg.device or "")
    return name if name in DRAFT_ATTENTION_BACKEND_CHOICES else None


def _needs_draft_backend(cfg: Any) -> bool:
    algorithm = cfg.speculative_algorithm
    return (
        algorithm is not None
        and str(algorithm).upper() != "NGRAM"  # drafts from the prompt, without a model
        and cfg.speculative_draft_attention_backend is None
    )


NAMED_STORAGE = ("file", "nixl", "mooncake", "eic", "simm", "mori", "seaweedfs")
"""Storage backends of HiCache whose keys hold the model's name."""


def _media_are_ours(cfg: Any) -> bool:
    """Whether this package reads or mends media of the model."""
    from sglang_mminfer.modality.geometry import family_of

    return family_of(_model_config(cfg).hf_config) is not None


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "executor",
        lambda cfg: config.executor() not in config.EXECUTOR_CHOICES,
        f"{config.EXECUTOR_ENVIRONMENT} names no executor; expected one of {', '.join(config.EXECUTOR_CHOICES)}.",
    ),
    Refusal(
        "dense_heads",
        lambda cfg: (os.environ.get(config.DENSE_HEADS_ENVIRONMENT) or "auto") not in config.DENSE_HEADS_CHOICES,
        f"{config.DENSE_HEADS_ENVIRONMENT}: expected one of {', '.join(config.DENSE_HEADS_CHOICES)}.",
    ),
    Refusal(
        "audit",
        lambda cfg: config.audit_environment_is_bad(),
        f"{config.AUDIT_ENVIRONMENT}: expected a share of requests from 0 to 1.",
    ),
    Refusal(
        "mends",
        lambda cfg: mends.why_bad() is not None,
        f"{mends.ENVIRONMENT}: expected all, none, names of mends (`mminfer doctor` lists them) to have only these, or "
        "names with a minus each to have all others.",
    ),
    Refusal(
        "plan_budget",
        lambda cfg: config.plan_budget_is_bad(),
        f"{' and '.join(config.PLAN_BUDGET_ENVIRONMENT)}: expected numbers above 0 (inf: no limit).",
    ),
    Refusal(
        "decode_only",
        lambda cfg: _backends(cfg)[0] != config.BACKEND_NAME,
        "mminfer is named for decoding only, and it works on the prefill; use "
        "--prefill-attention-backend mminfer or --attention-backend mminfer.",
    ),
    Refusal(
        "ray",
        lambda cfg: cfg.use_ray,
        "--use-ray starts schedulers that load no plugins, so they would not know the backend mminfer; "
        "launch without --use-ray.",
    ),
    Refusal(
        "deterministic",
        lambda cfg: cfg.enable_deterministic_inference or cfg.rl_on_policy_target is not None,
        "--enable-deterministic-inference (also set by --rl-on-policy-target) needs a backend whose kernels "
        "SGLang has checked for it; drop it or use --attention-backend fa3, flashinfer or triton.",
    ),
    Refusal(
        "multi_item_scoring",
        lambda cfg: cfg.enable_mis,
        "--enable-mis needs the custom masks of --attention-backend flashinfer; drop one of the two.",
    ),
    Refusal(
        "no_kv_cache",
        lambda cfg: cfg.prefill_only_disable_kv_cache,
        "--prefill-only-disable-kv-cache leaves no KV cache, and mminfer reads keys and values from there; "
        "drop it or use --attention-backend fa3.",
    ),
    Refusal(
        "unified_memory",
        lambda cfg: cfg.enable_unified_memory or cfg.enable_page_major_kv_layout,
        "--enable-unified-memory and --enable-page-major-kv-layout store KV in a layout that mminfer does "
        "not read; drop them or use --attention-backend flashinfer.",
    ),
    Refusal(
        "kv_sharding",
        lambda cfg: cfg.enable_kv_cache_sharding,
        "--enable-kv-cache-sharding leaves each rank a part of every cached page, and mminfer needs whole "
        "ones; drop it or use --attention-backend fa3.",
    ),
    Refusal(
        "block_scaled_kv",
        lambda cfg: cfg.kv_cache_dtype in ("nvfp4", "fp4_mx_block16", "mxfp8"),
        "--kv-cache-dtype nvfp4, fp4_mx_block16 and mxfp8 are read only by the backends made for them; use "
        "--kv-cache-dtype auto (fp8_e4m3 is accepted, and its requests run dense).",
    ),
    Refusal(
        "prefill_context_parallel",
        lambda cfg: cfg.attn_cp_size > 1 or cfg.enable_prefill_cp,
        "--attn-cp-size above 1 and --enable-prefill-cp split a prompt over ranks, and mminfer plans whole "
        "prompts; use --tp-size instead.",
    ),
    Refusal(
        "decode_context_parallel",
        lambda cfg: cfg.dcp_size > 1,
        "--dcp-size above 1 spreads the KV cache of one request over ranks, and mminfer reads all of it; use "
        "--tp-size instead.",
    ),
    Refusal(
        "pdmux",
        lambda cfg: cfg.enable_pdmux,
        "--enable-pdmux runs the prefill layer by layer in a mode that is always dense; drop it.",
    ),
    Refusal(
        "diffusion_llm",
        lambda cfg: cfg.dllm_algorithm is not None,
        "--dllm-algorithm runs attention that is not causal, and every pattern here is causal; drop one of the two.",
    ),
    Refusal(
        "hisparse",
        lambda cfg: cfg.enable_hisparse,
        "--enable-hisparse moves keys and values out of the pool that mminfer reads; drop one of the two.",
    ),
    Refusal(
        "full_prefill_graph",
        _full_prefill_graph,
        "--cuda-graph-backend-prefill full captures one attention for all prompts, and a sparse plan differs "
        "for each; use breakable or disabled.",
    ),
    Refusal(
        "mla",
        _is_mla,
        "this model uses multi-head latent attention, whose cache holds no keys and values per head; mminfer "
        "serves MHA and GQA models only, so drop --attention-backend mminfer.",
    ),
    Refusal(
        "linear_attention",
        _has_linear_attention,
        "this model has linear-attention or state-space layers, whose backends SGLang builds by the name of "
        "the attention backend; drop --attention-backend mminfer.",
    ),
    Refusal(
        "encoder_decoder",
        lambda cfg: _model_config(cfg).is_encoder_decoder,
        "this model is an encoder-decoder, whose requests keep the encoder's KV slots before those of the prompt, and "
        "mminfer reads a prompt from its first slot; drop --attention-backend mminfer.",
    ),
    Refusal(
        "own_sparse_attention",
        _has_own_sparse_attention,
        "this model brings a sparse attention of its own; drop --attention-backend mminfer.",
    ),
    Refusal(
        "draft_backend",
        lambda cfg: _needs_draft_backend(cfg) and _draft_backend(cfg) is None,
        "--speculative-algorithm runs a draft model, for which mminfer is no backend; name one with "
        "--speculative-draft-attention-backend.",
    ),
    Refusal(
        "tokenizer_workers",
        lambda cfg: cfg.tokenizer_worker_num > 1 and (cfg.device == "cpu" or _media_are_ours(cfg)),
        "--tokenizer-worker-num above 1 starts tokenizers that load no plugins, so media of this model would not be "
        "mended, or not be read at all; use 1.",
    ),
    Refusal(
        "hicache_storage",
        lambda cfg: cfg.hicache_storage_backend not in (None, *NAMED_STORAGE),
        "--hicache-storage-backend: this storage does not keep pages by the model's name, to which mminfer adds its "
        f"head config, so servers would read each other's approximated KV; use one of {', '.join(NAMED_STORAGE)}.",
    ),
)


def check_installation() -> None:
    """Says what of SGLang is not there that this package hooks.

    Raises:
        UnsupportedLaunch: if mminfer cannot do without it.
    """
    from importlib.metadata import version

    installed = version("sglang")
    if essential := [hook.target for hook in _missing if hook.essential]:
        raise UnsupportedLaunch(
            f"mminfer: SGLang {installed} has no {', '.join(essential)}, without which answers could be wrong; install "
            f"sglang{config.TESTED_SGLANG}, or drop --attention-backend mminfer."
        )
    for hook in _missing:
        logger.warning("mminfer: SGLang %s has no %s, so this goes unmended: %s", installed, hook.target, hook.reason)


def uses_mminfer(server_args: Any) -> bool:
    """True if the arguments name our backend, for prefill or decode."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return config.BACKEND_NAME in _backends(resolving_view(server_args))


def refuse(server_args: Any) -> None:
    """Raise UnsupportedLaunch with a sentence for every refusal that applies."""
    from sglang.srt.arg_groups.overrides import resolving_view

    cfg = resolving_view(server_args)
    if messages := [refusal.message for refusal in REFUSALS if refusal.applies(cfg)]:
        raise UnsupportedLaunch("\n".join(f"mminfer: {message}" for message in messages))


def check_launch(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook: see `HOOKS`."""
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    wanted = uses_mminfer(server_args)
    server_args._mminfer_wanted = wanted
    if wanted:
        check_installation()
        if untested := config.why_untested():
            logger.warning("mminfer: %s", untested)
        refuse(server_args)
        cfg = resolving_view(server_args)
        if _needs_draft_backend(cfg):
            draft = _draft_backend(cfg)
            logger.info("mminfer: the draft model runs on %s.", draft)
            declare_resolution(server_args, _HERE, speculative_draft_attention_backend=draft)
        if page := config.page_size_of_default(server_args, cfg.device or ""):
            backend, size = page
            logger.info("mminfer: the page size is %d, as %s needs, which SGLang takes by default here.", size, backend)
            declare_resolution(server_args, _HERE, page_size=size)
        if cfg.tokenizer_worker_num > 1:
            logger.warning("mminfer: tokenizer workers load no plugins, so no mend of this package acts on media.")
        model = model_config_of(server_args)
        config.load_for_model(server_args, model.hf_config)
        if not model.is_multimodal:
            logger.warning("mminfer: this model takes no images or video, so every request will run dense.")
    else:
        for flag, attribute in ((config.FLAG, config.ATTRIBUTE), (config.AUDIT_FLAG, config.AUDIT_ATTRIBUTE)):
            if getattr(server_args, attribute, None):
                logger.warning(
                    "%s has no effect without --attention-backend mminfer or --prefill-attention-backend mminfer.",
                    flag,
                )
    previous(server_args)


def check_result(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook: see `HOOKS`."""
    from sglang.srt.arg_groups.overrides import resolving_view

    previous(server_args)
    prefill, _ = _backends(resolving_view(server_args))
    if getattr(server_args, "_mminfer_wanted", False) and prefill != config.BACKEND_NAME:
        raise UnsupportedLaunch(
            f"mminfer: SGLang runs the prefill of this model on {prefill!r} whatever backend is asked for; "
            "drop --attention-backend mminfer."
        )


# Media


def decode_without_ffmpeg(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND VideoDecoderWrapper.__init__: SGLang's own fallback to decord, taken when it is needed."""
    from sglang.srt.utils import video_decoder

    from sglang_mminfer import asked, cpu_platform

    if not asked.for_mminfer() and not cpu_platform.selected():
        return original(self, *args, **kwargs)
    try:
        original(self, *args, **kwargs)
    except RuntimeError as error:
        if "Could not load libtorchcodec" not in str(error):
            raise
        logger.warning("mminfer: torchcodec finds no FFmpeg libraries; video is decoded by decord.")
        video_decoder._BACKEND = "decord"
        original(self, *args, **kwargs)

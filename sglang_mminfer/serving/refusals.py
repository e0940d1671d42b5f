"""`REFUSALS`: every launch that can never work, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_mminfer import mends, releases, settings
from sglang_mminfer.serving import (
    basis_choice,
    cpu_platform,
    dense_backend,
    flags,
    head_config_choice,
    hooks,
    readers,
)


@dataclass(frozen=True)
class Refusal:
    """A launch that can never work.

    Attributes:
        name: for tests.
        applies: whether a launch is one of these; gets a view of ServerArgs, of which SGLang has resolved a part.
        message: what is wrong and what to do instead, for the user.
    """

    name: str
    applies: Callable[[Any], bool]
    message: str


def backends(cfg: Any) -> tuple[str | None, str | None]:
    """The attention backends of prefill and of decoding."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    return attention_backends_of(cfg)


def _model_config(cfg: Any) -> Any:
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(cfg)


def _is_mla(cfg: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return _model_config(cfg).attention_arch == AttentionArch.MLA


def _has_other_linear_attention(cfg: Any) -> bool:
    """Whether the model has recurrent layers other than the gated delta nets of Qwen3.5, or no attention at all."""
    from sglang.srt.configs import Qwen3NextConfig
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config, mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    model = _model_config(cfg)
    if model.attention_arch == AttentionArch.SSM:
        return True
    return mambaish_config(model) is not None and not isinstance(hybrid_gdn_config(model), Qwen3NextConfig)


def _has_own_sparse_attention(cfg: Any) -> bool:
    from sglang.srt.configs.model_config import is_minimax_sparse
    from sglang.srt.layers.attention.qsa.config import is_qwen_qsa

    hf_config = _model_config(cfg).hf_config
    return is_minimax_sparse(hf_config) or is_qwen_qsa(hf_config)


CLOSED_LISTS = (
    *("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
    *("Llama4ForConditionalGeneration", "Llama4ForCausalLM", "GptOssForCausalLM"),
)
"""Architectures that SGLang serves with the attention backends of a list alone, and mminfer is in none of them."""

LISTS_FOR_WINDOWS = ("Exaone4ForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM")
"""The same if their config has sliding windows."""


def _backends_are_listed(cfg: Any) -> bool:
    hf_config = _model_config(cfg).hf_config
    architecture = (getattr(hf_config, "architectures", None) or [""])[0]
    windows = getattr(hf_config, "sliding_window_pattern", None) is not None
    return architecture in CLOSED_LISTS or (architecture in LISTS_FOR_WINDOWS and windows)


def _pictures_are_off(cfg: Any) -> bool:
    """Whether SGLang has switched off the media of a model that takes some, and nobody asked for that."""
    from sglang.srt.configs.model_config import is_multimodal_model

    if cfg.enable_multimodal is not None or _backends_are_listed(cfg):  # these are refused whatever the flag
        return False
    model = _model_config(cfg)
    return not model.is_multimodal and is_multimodal_model(getattr(model.hf_config, "architectures", None) or [])


def _full_prefill_graph(cfg: Any) -> bool:
    resolved = getattr(cfg.cuda_graph_config, "prefill", None)
    return (resolved.backend if resolved else cfg.cuda_graph_backend_prefill) == "full"


def draft_backend(cfg: Any) -> str | None:
    """The dense backend beneath ours if a draft model can run on it, else None."""
    from sglang.srt.arg_groups.choices import DRAFT_ATTENTION_BACKEND_CHOICES
    from sglang.srt.arg_groups.overrides import record_of

    name = dense_backend.dense_backend_name(record_of(cfg), cfg.device or "")
    return name if name in DRAFT_ATTENTION_BACKEND_CHOICES or on_our_cpu(cfg) else None


def on_our_cpu(cfg: Any) -> bool:
    """Whether the server runs on this package's CPU platform."""
    return cfg.device == "cpu" and cpu_platform.is_active()


def _speculates_in_vain(cfg: Any) -> bool:
    """Whether this package's CPU platform lacks what the launch's speculative decoding needs."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    if cfg.speculative_algorithm is None or not on_our_cpu(cfg):
        return False
    return not cpu_platform.can_speculate(cfg) or mambaish_config(_model_config(cfg)) is not None


def needs_draft_backend(cfg: Any) -> bool:
    """Whether a draft model would run, and nobody has named its attention backend."""
    algorithm = cfg.speculative_algorithm
    return (
        algorithm is not None
        and str(algorithm).upper() != "NGRAM"  # takes drafts from the prompt, without a model
        and cfg.speculative_draft_attention_backend is None
    )


NAMED_STORAGE = ("file", "nixl", "mooncake", "eic", "simm", "mori", "seaweedfs")
"""HiCache storage backends whose keys contain the model's name, to which mminfer adds its head config."""


def _guard_sees_nothing(cfg: Any) -> bool:
    """Whether there is a guard and no request is audited. What cannot be read is another refusal's matter."""
    if settings.is_bad(settings.guard_error) or settings.is_bad(settings.audit_rate):
        return False
    return flags.guard_error(cfg) > 0 and flags.audit_rate(cfg) == 0


def _media_root_is_passed_by(cfg: Any) -> bool:
    """Whether there is a media root, and requests or media come in where nothing of ours runs."""
    if settings.is_bad(settings.media_root) or flags.media_root(cfg) is None:
        return False
    return readers.read_elsewhere(cfg) is not None


def _media_root_is_not_held(cfg: Any) -> bool:
    """Whether there is a media root, and this SGLang reads media at other places than those that are hooked."""
    if settings.is_bad(settings.media_root) or flags.media_root(cfg) is None:
        return False
    functions = ("media_root:", "clip_sender:generate_request", "ffmpeg:decode_without_ffmpeg")
    lacking = hooks.lacking(*(f"serving.{function}" for function in functions))
    return any(hook.is_missed() or hook.target_exists() for hook in lacking)


def _keeps_kv_by_head() -> bool:
    from sglang.srt.environ import envs

    return envs.SGLANG_USE_HND_KVCACHE.get()


def _media_are_ours(cfg: Any) -> bool:
    """Whether this package has a family for the model, so that it reads or mends the model's media."""
    from sglang_mminfer.families import family_of

    return family_of(_model_config(cfg).hf_config) is not None


def _basis_is_unknown(cfg: Any) -> bool:
    """Whether the basis of the heads comes from the clip, so that nobody can name the KV that follows from it yet."""
    from sglang.srt.arg_groups.overrides import record_of

    model = _model_config(cfg)
    head_config, _ = head_config_choice.load_for_model(record_of(cfg), model.hf_config)
    return basis_choice.makes_clip(head_config, model)


PAGES_ON_CPU = Refusal(
    "pages_on_cpu",
    lambda cfg: on_our_cpu(cfg) and (cfg.page_size or 1) > 1 and not releases.allocates_pages_anywhere(),
    "--page-size above 1 needs SGLang 0.5.22 or later on a CPU; use 1.",
)
SPECULATION_ON_CPU = Refusal(
    "speculation_on_cpu",
    _speculates_in_vain,
    f"on a CPU --speculative-algorithm is {cpu_platform.SPECULATIVE_ALGORITHM} of SGLang 0.5.23, with chains of drafts "
    "(--speculative-eagle-topk 1), without --enable-multi-layer-eagle, and for models whose layers all have full "
    "attention.",
)
"""Holds for servers without mminfer, too: it is the platform of this package on which they run."""

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "executor",
        lambda cfg: settings.executor() not in settings.EXECUTOR_CHOICES,
        f"{settings.EXECUTOR.variable} names no executor; expected one of {', '.join(settings.EXECUTOR_CHOICES)}.",
    ),
    Refusal(
        "sparse",
        lambda cfg: settings.sparse() not in settings.SPARSE_CHOICES,
        f"{settings.SPARSE.variable}: expected one of {', '.join(settings.SPARSE_CHOICES)}.",
    ),
    Refusal(
        "dense_heads",
        lambda cfg: settings.dense_heads() not in settings.DENSE_HEADS_CHOICES,
        f"{settings.DENSE_HEADS.variable}: expected one of {', '.join(settings.DENSE_HEADS_CHOICES)}.",
    ),
    Refusal(
        "audit",
        lambda cfg: settings.is_bad(settings.audit_rate),
        f"{settings.AUDIT.variable}: expected a share of requests from 0 to 1.",
    ),
    Refusal(
        "guard",
        lambda cfg: settings.is_bad(settings.guard_error),
        f"{settings.GUARD.variable}: expected a relative output error from 0 (no guard) to 1.",
    ),
    Refusal(
        "guard_without_audit",
        _guard_sees_nothing,
        f"{settings.GUARD.flag} judges heads by audited requests, and {settings.AUDIT.flag} 0 audits none; leave it "
        f"out ({settings.GUARD_AUDIT_RATE:g} of the requests are audited then) or name a share above 0.",
    ),
    Refusal(
        "mends",
        lambda cfg: mends.why_bad() is not None,
        f"{settings.MENDS.variable}: expected all, none, names of mends (`mminfer doctor` lists them) to have only "
        "these, or names with a minus each to have all others.",
    ),
    Refusal(
        "plan_budget",
        lambda cfg: settings.is_bad(settings.plan_budget),
        f"{settings.PLAN_BUDGET_MS.variable} and {settings.PLAN_BUDGET_MB.variable}: expected numbers above 0 (inf: no "
        "limit).",
    ),
    Refusal(
        "max_megapixels",
        lambda cfg: settings.is_bad(settings.max_megapixels),
        f"{settings.MAX_MEGAPIXELS.variable}: expected megapixels, a number above 0.",
    ),
    Refusal(
        "media_root",
        lambda cfg: settings.is_bad(settings.media_root),
        f"{settings.MEDIA_ROOT.variable}: expected a directory that exists.",
    ),
    Refusal(
        "media_cache",
        lambda cfg: settings.is_bad(settings.media_cache_bytes),
        f"{settings.MEDIA_CACHE_MB.variable}: expected megabytes, a number from 0 (none) on.",
    ),
    Refusal(
        "media_root_passed_by",
        _media_root_is_passed_by,
        f"{settings.MEDIA_ROOT.flag} is held in SGLang's own tokenizer process, and with --tokenizer-worker-num above "
        "1, --grpc-mode, --smg-grpc-mode, --language-only, --encoder-only or SGLANG_RUST_SERVER media are read "
        "elsewhere; drop one of the two.",
    ),
    Refusal(
        "media_root_not_held",
        _media_root_is_not_held,
        f"{settings.MEDIA_ROOT.flag} cannot be held, because this SGLang reads media at other places than mminfer "
        f"knows; drop it, or install sglang{settings.TESTED_SGLANG}.",
    ),
    Refusal(
        "decode_only",
        lambda cfg: backends(cfg)[0] != settings.BACKEND_NAME,
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
        releases.shards_kv_cache,
        "--enable-kv-cache-sharding leaves each rank a part of every cached page, and mminfer needs whole "
        "ones; drop it or use --attention-backend fa3.",
    ),
    Refusal(
        "kv_layout",
        lambda cfg: _keeps_kv_by_head(),
        "SGLANG_USE_HND_KVCACHE keeps keys and values by head within a page, and mminfer reads them by token; unset "
        "it.",
    ),
    Refusal(
        "block_scaled_kv",
        lambda cfg: cfg.kv_cache_dtype in ("nvfp4", "fp4_mx_block16", "mxfp8"),
        "--kv-cache-dtype nvfp4, fp4_mx_block16 and mxfp8 are read only by the backends made for them; use "
        "--kv-cache-dtype auto (or fp8_e4m3 or fp8_e5m2).",
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
        _has_other_linear_attention,
        "this model has linear-attention or state-space layers other than gated delta nets (which Qwen3.5 has), and "
        "mminfer is not tried beside them; drop --attention-backend mminfer.",
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
        "listed_backends",
        _backends_are_listed,
        "SGLang serves this model (Gemma 4, Llama 4, GPT-OSS, EXAONE 4 with sliding windows) only with attention "
        "backends of a list of its own, and mminfer is not in it; drop --attention-backend mminfer.",
    ),
    Refusal(
        "pictures_off",
        _pictures_are_off,
        "SGLang serves this model (Gemma 3) without pictures unless told otherwise, and leaves those of a request out "
        "without a word; add --enable-multimodal.",
    ),
    Refusal(
        "draft_backend",
        lambda cfg: needs_draft_backend(cfg) and draft_backend(cfg) is None,
        "--speculative-algorithm runs a draft model, for which mminfer is no backend; name one with "
        "--speculative-draft-attention-backend.",
    ),
    PAGES_ON_CPU,
    SPECULATION_ON_CPU,
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
    Refusal(
        "hicache_names",
        lambda cfg: (
            cfg.hicache_storage_backend in NAMED_STORAGE
            and bool(hooks.lacking("serving.head_config_choice:storage_model_name"))
        ),
        "--hicache-storage-backend: this release of SGLang names pages where mminfer cannot add its head config, so "
        "servers would read each other's approximated KV; SGLang 0.5.22 and later can.",
    ),
    Refusal(
        "hicache_basis",
        lambda cfg: cfg.hicache_storage_backend in NAMED_STORAGE and _basis_is_unknown(cfg),
        "--hicache-storage-backend keeps pages by the basis with which heads choose keys, and the built-in clip gives "
        f"one only after the start; make a file with `mminfer basis` and name it in {settings.BASIS.variable}.",
    ),
)

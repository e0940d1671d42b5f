"""Which dense backend runs beneath ours, and the page size that it needs."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.settings import BACKEND_NAME

PAGE_SIZES: dict[str, tuple[int, ...]] = {"trtllm_mha": (64, 16, 32, 128), "fa4": (128,)}
"""The page sizes that a default backend takes, if it does not take all. SGLang sets the first one for its name."""

DEFAULT_ATTRIBUTE = "_mminfer_default_backend"
"""Attribute of ServerArgs with SGLang's default backend, where its page size was settled for it."""


def settle_default(server_args: Any, name: str) -> None:
    """Fixes SGLang's default backend. SGLang chooses it while the page size is open, and with drafts that are chains it
    would choose another one for a page size above 1."""
    setattr(server_args, DEFAULT_ATTRIBUTE, name)


def dense_backend_name(server_args: Any, device: str) -> str:
    """The attention backend that SGLang would use for prefill without this plugin.

    It is the base backend that the user named beside `--prefill-attention-backend mminfer`, else SGLang's own choice
    for the model and the device. If that choice cannot work with the user's page size, the next backend that takes
    every page size is used; see `page_size_of_default`.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    view = resolving_view(server_args)
    name = _default_backend_name(server_args, device)
    page_sizes = PAGE_SIZES.get(name)
    if view.attention_backend in (None, BACKEND_NAME) and page_sizes and view.page_size not in page_sizes:
        return "triton" if model_config_of(server_args).has_asymmetric_kv else "flashinfer"
    return name


def page_size_of_default(server_args: Any, device: str) -> tuple[str, int] | None:
    """(backend, page size) if SGLang's default backend needs a page size that SGLang would set for it, else None.

    None if the user named a page size or a dense backend. SGLang sets page sizes by the name of the attention backend,
    and that name is ours here.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    view = resolving_view(server_args)
    if view.attention_backend != BACKEND_NAME or view.page_size not in (None, 1):
        return None
    name = _default_backend_name(server_args, device)
    return (name, PAGE_SIZES[name][0]) if name in PAGE_SIZES else None


def _default_backend_name(server_args: Any, device: str) -> str:
    """The base backend that the user named, else SGLang's choice, whatever page size it needs."""
    from sglang.srt.arg_groups.model_override_base import (
        get_default_attn_backend,
        model_config_of,
        resolving_view,
        use_mla_backend,
    )

    view = resolving_view(server_args)
    if view.attention_backend not in (None, BACKEND_NAME):
        return view.attention_backend
    if settled := getattr(server_args, DEFAULT_ATTRIBUTE, None):
        return settled
    if str(device).split(":")[0] == "cpu":
        return "torch_native"
    name = get_default_attn_backend(server_args, use_mla_backend(server_args), model_config_of(server_args))
    unfit = (name == "fa3" and view.kv_cache_dtype == "fp8_e5m2") or _is_unfit_for_hybrid(name, view)
    return "triton" if unfit else name


def _is_unfit_for_hybrid(name: str, view: Any) -> bool:
    """Whether SGLang would take Triton instead, because some layers of the model have a recurrent state.

    One of its ways to cache such states allows pages of one token alone, and on sm_100 it takes trtllm_mha or Triton.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.runtime_context import get_platform

    if mambaish_config(model_config_of(view)) is None:
        return False
    strategy = view.mamba_radix_cache_strategy
    at_ends = strategy == "no_buffer" or (strategy == "auto" and view.linear_attn_backend != "triton")
    needs_pages_of_one = at_ends and not view.disable_radix_cache
    return (name in PAGE_SIZES and needs_pages_of_one) or (name != "trtllm_mha" and get_platform().is_sm100)

"""Where the basis of a server's heads comes from. Decided once, when the server is launched, before its processes are.

A config that chooses keys by a basis gets it from the first of these that there is: the file that SGLANG_MMINFER_BASIS
names; the file beside the config; an earlier start's, from the cache; the built-in clip, which the server computes
before its first request. Without one the heads choose by q . k itself.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Literal

from sglang_mminfer import settings
from sglang_mminfer.serving import readers

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig, ModelBasis

logger = logging.getLogger(__name__)

BASIS_ATTRIBUTE = "_mminfer_basis"
"""Attribute of ServerArgs, see `flags`: AWAITED if the server makes the basis from the clip. All processes read it, so
that none waits for a clip that nobody sends."""

AWAITED: Literal["clip"] = "clip"


def with_basis(head_config: HeadConfig, server_args: Any, hf_config: Any) -> HeadConfig:
    """The config with the basis that is known before the server computes anything.

    Raises:
        HeadConfigError: if the setting names no basis, or one that cannot be used.
    """
    if not head_config.basis_rank:
        return head_config
    setting = settings.basis()
    if setting == "none":
        return dataclasses.replace(head_config, basis=None)
    if setting != "clip":
        return dataclasses.replace(head_config, basis=_of_file(setting))
    if head_config.basis is not None or is_awaited(server_args):
        return head_config
    return dataclasses.replace(head_config, basis=_of_earlier_start(server_args, hf_config, head_config))


def settle(server_args: Any, head_config: HeadConfig, model: Any) -> None:
    """Notes whether the server makes the basis from the clip; says so if it cannot.

    Args:
        head_config: from `with_basis`.
        model: SGLang's ModelConfig.
    """
    if not makes_clip(head_config, model):
        return
    if why := why_no_clip(server_args, model):
        logger.warning(
            "mminfer: heads choose keys by q . k itself, which is slower than by a basis: the built-in clip is not "
            "computed %s. `mminfer basis` makes a file for %s.",
            why,
            settings.BASIS.variable,
        )
        return
    setattr(server_args, BASIS_ATTRIBUTE, AWAITED)


def makes_clip(head_config: HeadConfig, model: Any) -> bool:
    """Whether a basis is needed, and none is known."""
    return bool(head_config.basis_rank and head_config.basis is None and settings.basis() == "clip") and bool(
        model.is_multimodal
    )


def why_no_clip(server_args: Any, model: Any) -> str | None:
    """Why a server cannot send itself the clip, as the end of a sentence; None: it can."""
    if server_args.disaggregation_mode != "null":
        return "where prefill and decoding run in different servers"
    if server_args.skip_tokenizer_init:
        return "without a tokenizer (--skip-tokenizer-init)"
    if elsewhere := readers.read_elsewhere(server_args):
        return elsewhere
    if not model.is_generation:
        return "by a server of embeddings"
    return None


def is_awaited(server_args: Any) -> bool:
    """Whether the server makes the basis from the clip."""
    return getattr(server_args, BASIS_ATTRIBUTE, None) == AWAITED


def without_basis(server_args: Any) -> str:
    """What heads do that choose by a basis, as long as there is none; see `HeadConfig.describe`."""
    if is_awaited(server_args):
        return "the built-in clip gives the basis, before the first request"
    return "no basis: by q . k"


def _of_file(path: str) -> ModelBasis:
    from sglang_mminfer.head_config import HeadConfigError, ModelBasis

    try:
        return ModelBasis.load(path)
    except HeadConfigError as error:
        raise HeadConfigError(
            f"{settings.BASIS.variable}: expected clip, none, or a file that `mminfer basis` wrote: {error}"
        ) from None


def _of_earlier_start(server_args: Any, hf_config: Any, head_config: HeadConfig) -> ModelBasis | None:
    """From the cache. A server on several machines, whose caches may differ, makes it anew."""
    from sglang_mminfer.serving import basis_cache

    if (getattr(server_args, "nnodes", 1) or 1) > 1:
        return None
    entry = basis_cache.entry_of(server_args, hf_config, head_config.basis_rank, head_config.rule)
    return entry.load() if entry is not None else None

"""Checks a launch, and settles what depends on it: draft backend, page size, head config and basis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_mminfer import settings
from sglang_mminfer.serving import basis_choice, dense_backend, flags, head_config_choice, hooks
from sglang_mminfer.serving.hooks import UnsupportedLaunch
from sglang_mminfer.serving.refusals import (
    PAGES_ON_CPU,
    REFUSALS,
    SPECULATION_ON_CPU,
    Refusal,
    backends,
    draft_backend,
    needs_draft_backend,
    on_our_cpu,
)

logger = logging.getLogger(__name__)


def _note(server_args: Any, device: str, hf_config: Any) -> str | None:
    from sglang_mminfer.families import family_of

    family = family_of(hf_config)
    return None if family is None else family.note(dense_backend.dense_backend_name(server_args, device))


def uses_mminfer(server_args: Any) -> bool:
    """Whether the arguments name our backend, for prefill or for decoding."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return settings.BACKEND_NAME in backends(resolving_view(server_args))


def refuse(server_args: Any, refusals: tuple[Refusal, ...] = REFUSALS) -> None:
    """Checks the launch.

    Raises:
        UnsupportedLaunch: with the message of every refusal that applies.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    cfg = resolving_view(server_args)
    if messages := [refusal.message for refusal in refusals if refusal.applies(cfg)]:
        raise UnsupportedLaunch("\n".join(f"mminfer: {message}" for message in messages))


def check_launch(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook, see `plugin.HOOKS`: refuses what cannot work, and settles draft backend and page size.

    Notes on the arguments, as `_mminfer_wanted`, whether they name our backend.

    Args:
        previous: SGLang's own step, which runs afterwards.

    Raises:
        UnsupportedLaunch: if SGLang lacks what is hooked, a refusal applies, or a server without mminfer has a media
            root or drafts that its CPU cannot verify.
        HeadConfigError: if the head config cannot be used with this model.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    with_mminfer = uses_mminfer(server_args)
    server_args._mminfer_wanted = with_mminfer
    cfg = resolving_view(server_args)
    if cfg.speculative_algorithm is not None and on_our_cpu(cfg):
        logger.warning("On a CPU drafts are verified by the most probable token, whatever temperature a request names.")
    if with_mminfer:
        hooks.check_installation()
        if warning := settings.why_untested():
            logger.warning("mminfer: %s", warning)
        refuse(server_args)
        if default := dense_backend.page_size_of_default(server_args, cfg.device or ""):
            backend, size = default
            logger.info("mminfer: the page size is %d, as %s needs, which SGLang takes by default here.", size, backend)
            declare_resolution(server_args, __name__, page_size=size)
            dense_backend.settle_default(server_args, backend)
        if needs_draft_backend(cfg):
            draft = draft_backend(cfg)
            logger.info("mminfer: the draft model runs on %s.", draft)
            declare_resolution(server_args, __name__, speculative_draft_attention_backend=draft)
        if cfg.tokenizer_worker_num > 1:
            logger.warning(
                "mminfer: tokenizer workers load no plugins, so no mend of this package acts on media, and there is no "
                "GET /mminfer."
            )
        model = model_config_of(server_args)
        head_config, _ = head_config_choice.load_for_model(server_args, model.hf_config)
        head_config_choice.pin(server_args, head_config)
        basis_choice.settle(server_args, head_config, model)
        if not model.is_multimodal:
            logger.warning("mminfer: this model takes no images or video, so every request will run dense.")
        if note := _note(server_args, cfg.device or "", model.hf_config):
            logger.warning("mminfer: %s", note)
    else:
        refuse(server_args, (PAGES_ON_CPU, SPECULATION_ON_CPU))
        if getattr(server_args, flags.MEDIA_ROOT_ATTRIBUTE, None):
            raise UnsupportedLaunch(
                f"mminfer: without --attention-backend mminfer nothing would hold {settings.MEDIA_ROOT.flag}, and "
                "clients could name any file; use both, or drop the directory."
            )
        if settings.MEDIA_ROOT.read():
            logger.warning("%s has no effect without --attention-backend mminfer.", settings.MEDIA_ROOT.variable)
        for flag in flags.without_effect(server_args):
            logger.warning(
                "%s has no effect without --attention-backend mminfer or --prefill-attention-backend mminfer.", flag
            )
    previous(server_args)


def check_result(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook, see `plugin.HOOKS`.

    Raises:
        UnsupportedLaunch: if SGLang replaced our backend by another one for this model.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    previous(server_args)
    prefill, _ = backends(resolving_view(server_args))
    if getattr(server_args, "_mminfer_wanted", False) and prefill != settings.BACKEND_NAME:
        raise UnsupportedLaunch(
            f"mminfer: SGLang runs the prefill of this model on {prefill!r} whatever backend is asked for; "
            "drop --attention-backend mminfer."
        )

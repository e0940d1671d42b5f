"""Which head config applies, and which setting named it.

The first of these that names a config wins: the flag --mminfer-config; the environment variable SGLANG_MMINFER_CONFIG;
`mminfer_config` in the model's config, where --json-model-override-args puts it; the built-in "default".
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sglang_mminfer import settings
from sglang_mminfer.serving import basis_choice, dense_backend, flags

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfigChoice:
    """A head config that was chosen.

    Attributes:
        name: a built-in name, or a path.
        source: the setting that named it, in words.
    """

    name: str
    source: str

    def __str__(self) -> str:
        return f"head config {self.name!r} ({self.source})"


def resolve(server_args: Any, hf_config: Any = None, environ: Mapping[str, str] | None = None) -> ConfigChoice:
    """The head config that applies. An empty name counts as none.

    Args:
        server_args: SGLang's ServerArgs, or any object; only the flag's value is read.
        hf_config: the model's transformers config with overrides applied, or None without a model.
        environ: the environment; None for that of this process.

    Raises:
        HeadConfigError: if the model's config holds something that is no string.
    """
    if name := getattr(server_args, flags.CONFIG_ATTRIBUTE, None):
        return ConfigChoice(str(name), settings.CONFIG.flag)
    if name := settings.CONFIG.read(environ):
        return ConfigChoice(name, settings.CONFIG.variable)
    name = getattr(hf_config, settings.MODEL_KEY, None)
    if name is not None and not isinstance(name, str):
        from sglang_mminfer.head_config import HeadConfigError

        raise HeadConfigError(f"{settings.MODEL_KEY} of the model config: expected a name or a path, got {name!r}")
    if name:
        return ConfigChoice(name, f"{settings.MODEL_KEY} of the model config")
    return ConfigChoice(settings.CONFIG.default, "built-in, as none was named")


def load_for_model(
    server_args: Any, hf_config: Any, environ: Mapping[str, str] | None = None
) -> tuple[HeadConfig, ConfigChoice]:
    """Loads the head config that applies, with its basis as far as that is known, and binds it to the model.

    Returns:
        (bound config, choice). Arguments are those of `resolve`.

    Raises:
        HeadConfigError: if it does not exist, is malformed or was made for another model. The message begins with the
            setting that named it.
    """
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    choice = resolve(server_args, hf_config, environ)
    try:
        head_config = HeadConfig.load(choice.name)
    except HeadConfigError as error:
        raise HeadConfigError(f"{choice.source}: {error}") from None
    head_config = basis_choice.with_basis(head_config, server_args, hf_config)
    try:
        return head_config.bind(hf_config), choice
    except HeadConfigError as error:
        raise HeadConfigError(f"{choice.source}: {error}") from None


def pin(server_args: Any, head_config: HeadConfig) -> None:
    """Name a config of the hub by its commit, so that all ranks load the same one even if a branch moves meanwhile."""
    if head_config.path and head_config.path.startswith(settings.HUB_SCHEME):
        setattr(server_args, flags.CONFIG_ATTRIBUTE, head_config.path)


def describe(head_config: HeadConfig, choice: ConfigChoice, dense_backend: str, server_args: Any) -> str:
    """The line that a scheduler logs about its head config."""
    return (
        f"mminfer: {choice}: {head_config.describe(basis_choice.without_basis(server_args))}. "
        f"What is not sparse runs on {dense_backend}. Provenance: {head_config.provenance.note}"
    )


@cache
def _process() -> str:
    """A name of this process that no other has."""
    return uuid.uuid4().hex


_announced = False


def announce_once(runner: Any) -> None:
    """Logs `describe` for a model runner: once in a process, and only on tensor-parallel rank 0."""
    global _announced
    if _announced:
        return
    _announced = True
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_rank == 0:
        head_config, choice = load_for_model(runner.server_args, runner.model_config.hf_config)
        stock = dense_backend.dense_backend_name(runner.server_args, runner.device)
        logger.info(describe(head_config, choice, stock, runner.server_args))


def storage_model_name(name: str | None, *args: Any, **kwargs: Any) -> str | None:
    """AFTER storage_model_name: the name plus a digest of the head config, because a page's KV depends on the config.

    With a guard, what heads do is known to this process alone, so the digest is of the process, too: its pages serve no
    other server, and not itself after a restart.

    Returns None, which leaves SGLang's name as it is, in a server without mminfer and if every head is dense.
    """
    from sglang_mminfer.mends import asked

    if not asked.for_mminfer() or asked.server_args() is None:
        return None
    from sglang.srt.arg_groups.model_override_base import model_config_of

    model = model_config_of(asked.server_args())
    head_config, _ = load_for_model(asked.server_args(), model.hf_config)
    if all(head_config.is_dense(layer) for layer in range(model.num_hidden_layers)):
        return None
    content = json.loads(head_config.to_json())
    del content["provenance"]
    if head_config.basis is not None:
        content["basis"] = head_config.basis.digest
    if flags.guard_error(asked.server_args()):
        content["process"] = _process()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name or ''}-mminfer-{digest}"

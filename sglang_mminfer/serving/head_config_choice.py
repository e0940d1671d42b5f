"""Which head config applies, and where it was named.

A config is named in one of four places; the first that names one wins:
the flag --mminfer-config, the environment variable SGLANG_MMINFER_CONFIG, `mminfer_config` of the model's
config (which is where --json-model-override-args puts it), and else the built-in "default".
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_mminfer import settings
from sglang_mminfer.serving import dense_backend, flags

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfigChoice:
    """The name (or path) of a head config and the place that named it."""

    name: str
    source: str

    def __str__(self) -> str:
        return f"head config {self.name!r} ({self.source})"


def resolve(server_args: Any, hf_config: Any = None, environ: Mapping[str, str] | None = None) -> ConfigChoice:
    """The config that applies. An empty name counts as none.

    Args:
        server_args: SGLang's ServerArgs, or any object; only the flag's value is read.
        hf_config: the model's transformers config with overrides applied, or None where there is no model.
        environ: the environment, the process's own if None.

    Raises:
        HeadConfigError: if the model's config names something that is no name.
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
    """The head config that applies, bound to the model, and where it was named.

    Raises:
        HeadConfigError: if it is not there, is malformed or was made for another model; the message begins
            with the place that named it.
    """
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    choice = resolve(server_args, hf_config, environ)
    try:
        return HeadConfig.load(choice.name).bind(hf_config), choice
    except HeadConfigError as error:
        raise HeadConfigError(f"{choice.source}: {error}") from None


def describe(head_config: HeadConfig, choice: ConfigChoice, dense_backend: str) -> str:
    """The line that a scheduler logs about its configuration."""
    return (
        f"mminfer: {choice}: {head_config.describe()}. "
        f"What is not sparse runs on {dense_backend}. Provenance: {head_config.provenance.note}"
    )


_announced = False


def announce_once(runner: Any) -> None:
    """Log `describe` for a model runner: once per process, and only where the tensor-parallel rank is 0."""
    global _announced
    if _announced:
        return
    _announced = True
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_rank == 0:
        head_config, choice = load_for_model(runner.server_args, runner.model_config.hf_config)
        logger.info(describe(head_config, choice, dense_backend.dense_backend_name(runner.server_args, runner.device)))


def storage_model_name(name: str | None, *args: Any, **kwargs: Any) -> str | None:
    """AFTER storage_model_name: the name with a digest of the head config, which the KV of a page depends on.

    None, which leaves the name as it is, in a server without mminfer and where every head is dense.
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
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name or ''}-mminfer-{digest}"

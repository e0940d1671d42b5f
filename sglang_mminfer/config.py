"""Which head config applies, where it was named, and which dense backend stands under it.

A config is named in one of four places; the first that names one wins:
the flag --mminfer-config, the environment variable SGLANG_MMINFER_CONFIG, `mminfer_config` of the model's
config (which is where --json-model-override-args puts it), and else the built-in "default".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig

logger = logging.getLogger(__name__)

BACKEND_NAME = "mminfer"

TESTED_SGLANG = ">=0.5.23,<0.5.24"
"""The versions of SGLang that the tests were run with, as in pyproject.toml."""

FLAG = "--mminfer-config"
ENVIRONMENT = "SGLANG_MMINFER_CONFIG"
MODEL_KEY = "mminfer_config"
DEFAULT = "default"

EXECUTOR_ENVIRONMENT = "SGLANG_MMINFER_EXECUTOR"
EXECUTOR_CHOICES = ("auto", "torch", "triton", "flashinfer")
DENSE_HEADS_ENVIRONMENT = "SGLANG_MMINFER_DENSE_HEADS"
DENSE_HEADS_CHOICES = ("auto", "stock", "own")

AUDIT_FLAG = "--mminfer-audit"
AUDIT_ENVIRONMENT = "SGLANG_MMINFER_AUDIT"
AUDIT_ATTRIBUTE = "_mminfer_audit"

PLAN_BUDGET_ENVIRONMENT = {"SGLANG_MMINFER_PLAN_BUDGET_MS": 200.0, "SGLANG_MMINFER_PLAN_BUDGET_MB": 256.0}
"""What planning one head pattern of a chunk may cost by estimate, and the defaults; see `patterns/budget.py`."""

ATTRIBUTE = "_mminfer_config"
"""Where the flag's value rides on ServerArgs. A real field cannot be added from outside; an attribute with an
underscore is pickled into SGLang's child processes all the same."""


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
    environ = os.environ if environ is None else environ
    if name := getattr(server_args, ATTRIBUTE, None):
        return ConfigChoice(str(name), FLAG)
    if name := environ.get(ENVIRONMENT):
        return ConfigChoice(name, ENVIRONMENT)
    name = getattr(hf_config, MODEL_KEY, None)
    if name is not None and not isinstance(name, str):
        from sglang_mminfer.head_config import HeadConfigError

        raise HeadConfigError(f"{MODEL_KEY} of the model config: expected a name or a path, got {name!r}")
    if name:
        return ConfigChoice(name, f"{MODEL_KEY} of the model config")
    return ConfigChoice(DEFAULT, "built-in, as none was named")


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


def config_argument(name: str) -> str:
    """argparse type of the flag: a bad config is a usage error, found before anything starts."""
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    if name:
        try:
            HeadConfig.load(name)
        except HeadConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name


def audit_argument(text: str) -> float:
    """argparse type of the audit flag: a share of requests."""
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:  # NaN is refused too
        raise argparse.ArgumentTypeError(f"expected a share of requests from 0 to 1, got {text!r}")
    return rate


def audit_rate(server_args: Any, environ: Mapping[str, str] | None = None) -> float:
    """The share of requests to audit: the flag's, else the environment's, else 0.

    Raises:
        argparse.ArgumentTypeError: if the environment names no share.
    """
    rate = getattr(server_args, AUDIT_ATTRIBUTE, None)
    if rate is not None:
        return rate
    return audit_argument((os.environ if environ is None else environ).get(AUDIT_ENVIRONMENT) or "0")


def audit_environment_is_bad() -> bool:
    """True if the environment names something that is no share of requests."""
    try:
        audit_rate(None)
    except argparse.ArgumentTypeError:
        return True
    return False


def plan_budget(environ: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Milliseconds and megabytes that planning one head pattern of a chunk may cost: the environment's, else 200, 256.

    Raises:
        ValueError: naming the variable that holds no number above 0.
    """
    environ = os.environ if environ is None else environ
    values = []
    for name, default in PLAN_BUDGET_ENVIRONMENT.items():
        text = environ.get(name) or str(default)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0 (inf: no limit), got {text!r}")
        values.append(value)
    return values[0], values[1]


def plan_budget_is_bad() -> bool:
    """True if the environment names something that is no budget."""
    try:
        plan_budget()
    except ValueError:
        return True
    return False


def why_untested() -> str | None:
    """A sentence if the SGLang that is installed is not one that the tests were run with."""
    from importlib.metadata import version

    if sglang_is_within(TESTED_SGLANG):
        return None
    return f"untested with SGLang {version('sglang')}; the tests were run with {TESTED_SGLANG}."


def sglang_is_within(versions: str) -> bool:
    """Whether the SGLang that is installed fits a version specifier."""
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version("sglang"), prereleases=True)


def executor() -> str:
    """The executor that the environment names for sparse layers, else "auto"."""
    return os.environ.get(EXECUTOR_ENVIRONMENT) or "auto"


def dense_heads_on_stock(device: str) -> Literal["never", "cheap", "always"]:
    """Whether dense heads beside sparse ones go to the stock backend: on a GPU where it is cheap, if nobody says.

    On a CPU stock `torch_native` computes rows of a cached prefix again, and our executor does not.
    """
    choice = os.environ.get(DENSE_HEADS_ENVIRONMENT) or "auto"
    if choice == "auto":
        return "never" if str(device).split(":")[0] == "cpu" else "cheap"
    return "always" if choice == "stock" else "never"


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
        logger.info(describe(head_config, choice, dense_backend_name(runner.server_args, runner.device)))


def dense_backend_name(server_args: Any, device: str) -> str:
    """The attention backend that SGLang would run the prefill on if this plugin were not there.

    A base backend that the user named beside `--prefill-attention-backend mminfer` is the answer; otherwise
    SGLang's own choice for this model and device. Where that needs another page size than the user asked for, the
    next one that takes any page size is used; see `page_size_of_default`.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    view = resolving_view(server_args)
    name = _default_backend_name(server_args, device)
    page_sizes = PAGE_SIZES.get(name)
    if view.attention_backend in (None, BACKEND_NAME) and page_sizes and view.page_size not in page_sizes:
        return "triton" if model_config_of(server_args).has_asymmetric_kv else "flashinfer"
    return name


PAGE_SIZES: dict[str, tuple[int, ...]] = {"trtllm_mha": (64, 16, 32, 128), "fa4": (128,)}
"""Of default backends that take these alone, the one first that SGLang sets when it sees the backend's name."""


def page_size_of_default(server_args: Any, device: str) -> tuple[str, int] | None:
    """The dense backend that SGLang takes by default, and the page size that it would set for it; None if it leaves
    the page size alone, the user named one, or the backend is the user's.

    SGLang sets page sizes by the backend's name, and sees ours.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    view = resolving_view(server_args)
    if view.attention_backend != BACKEND_NAME or view.page_size not in (None, 1):
        return None
    name = _default_backend_name(server_args, device)
    return (name, PAGE_SIZES[name][0]) if name in PAGE_SIZES else None


def _default_backend_name(server_args: Any, device: str) -> str:
    """The base backend of the user, or SGLang's choice, whatever page size it needs."""
    from sglang.srt.arg_groups.model_override_base import (
        get_default_attn_backend,
        model_config_of,
        resolving_view,
        use_mla_backend,
    )

    view = resolving_view(server_args)
    if view.attention_backend not in (None, BACKEND_NAME):
        return view.attention_backend
    if str(device).split(":")[0] == "cpu":
        return "torch_native"
    name = get_default_attn_backend(server_args, use_mla_backend(server_args), model_config_of(server_args))
    return "triton" if name == "fa3" and view.kv_cache_dtype == "fp8_e5m2" else name


def storage_model_name(name: str | None, *args: Any, **kwargs: Any) -> str | None:
    """AFTER storage_model_name: the name with a digest of the head config, which the KV of a page depends on.

    None, which leaves the name as it is, in a server without mminfer and where every head is dense.
    """
    from sglang_mminfer import asked

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

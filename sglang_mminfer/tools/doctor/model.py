"""The doctor on a model: what would run for it, as SGLang resolves the arguments at the start of a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sglang_mminfer import settings
from sglang_mminfer.serving import basis_choice, dense_backend, flags, head_config_choice
from sglang_mminfer.tools.doctor.finding import Finding, brief


def examine_model(
    model_path: str | None, config_name: str | None, launch: Mapping[str, Any] | None = None
) -> Iterator[Finding]:
    """What would run for a model; without a model, the head config only."""
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    if model_path is None:
        choice = (
            head_config_choice.ConfigChoice(config_name, settings.CONFIG.flag)
            if config_name
            else head_config_choice.resolve(None)
        )
        try:
            described = HeadConfig.load(choice.name).describe()
            yield Finding("model", "head config", "ok", f"{described}  [{choice.source}]")
        except HeadConfigError as error:
            yield _bad_config(f"{choice.source}: {error}")
        yield Finding("model", "model", "note", "none given; --model-path P says what would run for one")
        return

    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    from sglang_mminfer.serving.hooks import UnsupportedLaunch

    try:
        server_args = server_args_of(model_path, config_name, **(launch or {}))
    except UnsupportedLaunch as error:
        yield Finding("model", model_path, "error", "mminfer cannot serve it", str(error))
        return
    except HeadConfigError as error:
        yield _bad_config(str(error))
        return
    except Exception as error:
        yield Finding(
            "model",
            model_path,
            "error",
            f"SGLang does not accept it: {brief(error)}",
            "check the path and its config.json; a name on the hub needs network access or a filled cache.",
        )
        return
    model, view = model_config_of(server_args), resolving_view(server_args)
    hf_config = model.hf_config
    architecture = (hf_config.architectures or ["?"])[0]
    if model.is_multimodal:
        yield Finding("model", "model", "ok", architecture)
    else:
        yield Finding(
            "model",
            "model",
            "warning",
            f"{architecture} takes no images or video: every request would run dense",
            "use mminfer with a vision-language model.",
        )
    head_config, choice = head_config_choice.load_for_model(server_args, hf_config)
    described = head_config.describe(basis_choice.without_basis(server_args))
    yield Finding("model", "head config", "ok", f"{described}  [{choice.source}]")
    fits = "made for this model" if head_config.model else "for any model"
    layers = f"{model.num_hidden_layers} layers"
    if head_config.full_layers is not None:
        layers += f", of which {len(head_config.full_layers)} have attention"
    yield Finding("model", "fingerprint", "ok", f"{fits}; {layers}")
    dense = dense_backend.dense_backend_name(server_args, view.device)
    yield Finding("model", "dense backend", "ok", f"{dense}, on {view.device} in {model.dtype}")


def server_args_of(model_path: str, config_name: str | None, **fields: Any) -> Any:
    """SGLang's ServerArgs for a model on our backend, resolved as at the start of a server.

    If the machine has no accelerator and `fields` names no device, the device is "cpu".

    Args:
        model_path: a folder or a hub name.
        config_name: the value of --mminfer-config; None: that of the setting.
        **fields: further fields of ServerArgs.

    Raises:
        UnsupportedLaunch: mminfer cannot serve the model.
        HeadConfigError: the head config cannot be used, or was made for another model.
        Exception: any other error by which SGLang refuses the arguments.
    """
    from sglang.srt.server_args import ServerArgs

    from sglang_mminfer.serving import cpu_platform

    if not cpu_platform.accelerators():
        fields.setdefault("device", "cpu")
    server_args = ServerArgs(model_path=model_path, attention_backend=settings.BACKEND_NAME, **fields)
    setattr(server_args, flags.CONFIG_ATTRIBUTE, config_name)
    server_args.resolve_once()
    return server_args


def _bad_config(text: str) -> Finding:
    return Finding(
        "model",
        "head config",
        "error",
        text,
        f"correct the file, or name another with {settings.CONFIG.flag}; `default` and `dense` fit every model.",
    )

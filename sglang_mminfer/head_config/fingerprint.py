"""Which model a head config was made for."""

from __future__ import annotations

from typing import Any

import msgspec


class HeadConfigError(ValueError):
    """A head config cannot be used. The message names the file and the place in it."""


class ModelFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields in which a model must equal the one that a config was made for. The numbers are the text model's."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rope_theta: float

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}")


def fingerprint_of(hf_config: Any) -> ModelFingerprint:
    """The fingerprint of a transformers config. The numbers are those of its text model, if it has one inside.

    Raises:
        HeadConfigError: if the config lacks a field that the fingerprint needs.
    """
    text = hf_config
    # A config with numbers of its own is its text model's: SGLang hangs a text_config of transformers' defaults on that
    # of an original LLaVA when it makes the model.
    if "num_attention_heads" not in vars(hf_config):
        if hasattr(hf_config, "get_text_config"):
            text = hf_config.get_text_config()
        elif getattr(hf_config, "text_config", None) is not None:
            text = hf_config.text_config
    architectures = getattr(hf_config, "architectures", None) or [getattr(hf_config, "model_type", None)]
    try:
        heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
        return ModelFingerprint(
            architecture=str(architectures[0]),
            layers=int(text.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
            hidden_size=hidden,
            rope_theta=_rope_theta(text),
        )
    except AttributeError as error:
        raise HeadConfigError(f"the model's config has no text model a head config could fit: {error}") from None


def _rope_theta(text: Any) -> float:
    """The base of RoPE: in `rope_parameters` since transformers 5, by layer type if they differ; before, a field."""
    parameters = getattr(text, "rope_parameters", None) or {}
    for source in (parameters, parameters.get("full_attention") or {}):
        if source.get("rope_theta") is not None:
            return float(source["rope_theta"])
    return float(getattr(text, "rope_theta", None) or 10000.0)

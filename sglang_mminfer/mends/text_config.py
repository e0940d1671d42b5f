"""The part of a model's config that describes its text model."""

from __future__ import annotations

from typing import Any


def text_config_of(hf_config: Any) -> Any:
    """The part of a transformers config that describes the text model; all of it where no part does.

    A config with numbers of its own is its text model's: that of an original LLaVA has a text_config, too, which holds
    nothing but transformers' defaults.
    """
    if "num_attention_heads" in vars(hf_config):
        return hf_config
    if hasattr(hf_config, "get_text_config"):
        return hf_config.get_text_config()
    inside = getattr(hf_config, "text_config", None)
    return hf_config if inside is None else inside

"""Which model a head config was made for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from sglang_mminfer.mends.text_config import text_config_of

T = TypeVar("T")


class HeadConfigError(ValueError):
    """A head config cannot be used. The message names the file and the place in it."""


class ModelFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields in which a model must equal the one that a config was made for. The numbers are the text model's.

    Attributes:
        layers: all layers, those without full attention included.
        full_layers: the numbers of the layers with full attention, ascending, in a model where others have a recurrent
            state (Qwen3.5) or a sliding window (Gemma 3); None: all layers have full attention.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rope_theta: float
    full_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected a number above 0, got {self.rope_theta}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}")
        if (full := self.full_layers) is not None and (
            not full or list(full) != sorted(set(full)) or full[0] < 0 or full[-1] >= self.layers
        ):
            raise ValueError(f"full_layers: expected ascending layers of 0 .. {self.layers - 1}, got {list(full)}")

    @property
    def attention_layers(self) -> Sequence[int]:
        """The numbers of the layers with full attention."""
        return range(self.layers) if self.full_layers is None else self.full_layers

    def in_all_layers(self, rows: Sequence[Sequence[T]]) -> tuple[tuple[T, ...], ...]:
        """A row for each layer of the model, empty for those without full attention, from the rows of those with it."""
        by_layer = dict(zip(self.attention_layers, rows, strict=True))
        return tuple(tuple(by_layer.get(layer, ())) for layer in range(self.layers))


def fingerprint_of(hf_config: Any) -> ModelFingerprint:
    """The fingerprint of a transformers config. The numbers are those of its text model, if it has one inside.

    Raises:
        HeadConfigError: if the config lacks a field that the fingerprint needs.
    """
    text = text_config_of(hf_config)
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
            full_layers=_full_layers(text),
        )
    except AttributeError as error:
        raise HeadConfigError(f"the model's config has no text model a head config could fit: {error}") from None


def _full_layers(text: Any) -> tuple[int, ...] | None:
    """`ModelFingerprint.full_layers`: SGLang's config names the kinds of layers otherwise than transformers' config."""
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or []
    full = tuple(number for number, kind in enumerate(kinds) if kind not in _NOT_FULL)
    return None if len(full) == len(kinds) else full


_NOT_FULL = ("linear_attention", "sliding_attention")


def _rope_theta(text: Any) -> float:
    """The base of RoPE: in `rope_parameters` since transformers 5, by layer type if they differ; before, a field."""
    parameters = getattr(text, "rope_parameters", None) or {}
    for source in (parameters, parameters.get("full_attention") or {}):
        if source.get("rope_theta") is not None:
            return float(source["rope_theta"])
    return float(getattr(text, "rope_theta", None) or 10000.0)

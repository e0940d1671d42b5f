"""The factors with which the KV pool stores keys and values of another dtype than the model's, which is fp8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCALED = ("fa3", "fa4", "flashinfer", "triton", "trtllm_mha")
"""Dense backends that store and read keys and values with the scales of a layer."""

UNSCALED = ("torch_native",)
"""Dense backends that do both without."""


@dataclass(frozen=True)
class KVScales:
    """Stored keys and values, times these, are those of the model.

    Attributes:
        k: a part of the factor on q . k.
        v: the factor on what attention gives.
        stored: what the pool gets for writing, k and v as tensors; None: nothing.
    """

    k: float = 1.0
    v: float = 1.0
    stored: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, layer: Any, dense_backend: str) -> KVScales | None:
        """The scales of a layer whose pool has another dtype than the model.

        They come with a checkpoint. They count if the dense backend beneath ours uses them, because it writes some of
        the pool and reads what we wrote.

        Args:
            layer: SGLang's RadixAttention.

        Returns:
            None if the layer has scales and nobody knows what the dense backend makes of them.
        """
        k, v = getattr(layer, "k_scale", None), getattr(layer, "v_scale", None)
        if (k is None and v is None) or dense_backend in UNSCALED:
            return cls()
        k_number, v_number = getattr(layer, "k_scale_float", None), getattr(layer, "v_scale_float", None)
        if dense_backend not in SCALED or k is None or v is None or k_number is None or v_number is None:
            return None
        return cls(k_number, v_number, (k, v))

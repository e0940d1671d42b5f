"""LongVILA for SGLang: its encoder before SGLang's Qwen2 or Llama."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import get_model

from sglang_mminfer.families.longvila.encoder import LongVilaEncoder
from sglang_mminfer.families.own.vision_language import VisionLanguageModel


class LongVilaForConditionalGeneration(VisionLanguageModel):
    """Loads the original checkpoints' folders; a tensor is known by its folder and its own name."""

    allow_patterns_overrides = ["llm/*.safetensors"]  # noqa: RUF012  (SGLang reads it from the class)

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.encoder = LongVilaEncoder(config)
        self.secondary_weights = [
            DefaultModelLoader.Source(
                get_model().model_path,
                get_model().revision,
                prefix=f"{folder}.",
                allow_patterns_overrides=[f"{folder}/*.safetensors"],
            )
            for folder in ("vision_tower", "mm_projector")
        ]

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder.see(pixels)

    def encode(self, item: MultimodalDataItem, features: torch.Tensor) -> torch.Tensor:
        return features[0]

    def own_name(self, name: str) -> str | None:
        parameter = self.encoder.own_name(name)
        return f"encoder.{parameter}" if parameter else parameter

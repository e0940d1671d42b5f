"""LLaVA-Video for SGLang: its encoder before SGLang's Qwen2."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem

from sglang_mminfer.families.llava_video import layout
from sglang_mminfer.families.llava_video.encoder import LlavaVideoEncoder
from sglang_mminfer.families.own.vision_language import VisionLanguageModel

logger = logging.getLogger(__name__)


class LlavaVideoForConditionalGeneration(VisionLanguageModel):
    """Loads the original checkpoints' tensors by their own names."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.encoder = LlavaVideoEncoder(config)
        rows, cols, _ = layout.frame_shape(config, False)
        logger.info(
            "LLaVA-Video: %s pooling, newline position %s: %d x %d tokens a frame.",
            *(config.mm_spatial_pool_mode, layout.newline(config), rows, cols),
        )

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder.see(pixels)

    def encode(self, item: MultimodalDataItem, features: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode(item.is_video(), item.model_specific_data, features)

    def own_name(self, name: str) -> str | None:
        parameter = self.encoder.own_name(name)
        return f"encoder.{parameter}" if parameter else parameter

"""VideoChat-Flash for SGLang: tower, merging and projector before Qwen2."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem

from sglang_mminfer.families.own.vision_language import VisionLanguageModel
from sglang_mminfer.families.videochat_flash.config import CLIP_TOKENS, tower_config
from sglang_mminfer.families.videochat_flash.tiles import ACROSS, join
from sglang_mminfer.families.videochat_flash.vision import VisionPath

logger = logging.getLogger(__name__)

_OWN = {"model.vision_tower.vision_tower.": "vision.tower.", "model.mm_projector.": "vision.projector."}


class VideoChatFlashForConditionalGeneration(VisionLanguageModel):
    """Tensors keep the names of the original checkpoints; see `own_name`."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        tower = tower_config(config)
        super().__init__(config, quant_config, prefix)
        self.vision = VisionPath(tower, config.text_config.hidden_size)
        logger.info(
            "VideoChat-Flash: %s at %d pixels, %d tokens for a clip of %d frames.",
            *(tower.kind, tower.image_size, CLIP_TOKENS, tower.frames),
        )

    def get_image_feature(self, items: list[MultimodalDataItem]) -> list[torch.Tensor]:
        """One embedding for each clip of a video and each view of a picture.

        Each goes through the tower alone. Others in the same batch would move its features by a rounding error, and if
        two pairs of tokens are almost equally alike, that can change which of them is merged.
        """
        logger.debug("mminfer: %d items go through the vision tower.", len(items))
        return [self._embed(item) for item in items]

    get_video_feature = get_image_feature

    def _embed(self, item: MultimodalDataItem) -> torch.Tensor:
        if item.is_video():
            return self.vision.see(item.feature[None])[0]
        tiles = torch.cat([self.vision.see(tile[None, None]) for tile in item.feature])
        return join(tiles, item.model_specific_data.get(ACROSS, 1))

    def own_name(self, name: str) -> str | None:
        for theirs, ours in _OWN.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None

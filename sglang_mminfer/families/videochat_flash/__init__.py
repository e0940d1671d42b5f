"""VideoChat-Flash (arXiv 2501.00574): the five checkpoints of OpenGVLab, from their original files.

A video tower (UMT-L at 224 or 448 pixels, or InternVideo2-1B) sees clips of 4 frames; the patches of a clip are
merged until 64 tokens are left, so a frame costs 16. Clips stand one behind the other, and their tokens have no
raster: grids of the clip's stride apply, grids of rows do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_mminfer.families.own.family import OwnFamily

if TYPE_CHECKING:
    from sglang_mminfer.families.own.checkpoint import Checkpoint


class VideoChatFlash(OwnFamily):
    """VideoChat-Flash from its original checkpoints."""

    model_types = ("videochat_flash",)
    why = "SGLang has no model of it."
    architectures = ("VideoChatFlashQwenForCausalLM",)

    def read_config(self, root: dict[str, Any], files: Checkpoint) -> Any:
        from sglang_mminfer.families.videochat_flash.config import read

        return read(root)

    def classes(self) -> tuple[type, type]:
        from sglang_mminfer.families.videochat_flash.model import VideoChatFlashForConditionalGeneration
        from sglang_mminfer.families.videochat_flash.processor import VideoChatFlashProcessor

        return VideoChatFlashForConditionalGeneration, VideoChatFlashProcessor

    def chat_template(self, config: Any) -> str:
        """ChatML as the original's `chat` writes it. The processor adds the text behind a video."""
        from sglang_mminfer.families.own.chat_templates import chatml

        return chatml("You are a helpful assistant.", after_image="\\n")

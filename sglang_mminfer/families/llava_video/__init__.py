"""LLaVA-Video (arXiv 2410.02713): lmms-lab/LLaVA-Video-7B-Qwen2 and its siblings, from their original checkpoints.

SigLIP's 27 x 27 patches of each frame are projected, pooled to 13 x 13 or 14 x 14, and each row gets a newline
token: 13 x 14 or 14 x 15 tokens a frame, frame behind frame without a gap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_mminfer.families.own.family import OwnFamily

if TYPE_CHECKING:
    from sglang_mminfer.families.own.checkpoint import Checkpoint


class LlavaVideo(OwnFamily):
    """LLaVA-Video from its original checkpoints."""

    model_types = ("llava_video",)
    why = "SGLang takes these checkpoints for another LLaVA, which sees no video."
    architectures = ("LlavaQwenForCausalLM",)

    def read_config(self, root: dict[str, Any], files: Checkpoint) -> Any:
        """None for lmms-lab's LLaVA-OneVision, which shares the architecture and has none of the marks of video."""
        from sglang_mminfer.families.llava_video.config import is_llava_video, read

        return read(root) if is_llava_video(root) else None

    def classes(self) -> tuple[type, type]:
        from sglang_mminfer.families.llava_video.model import LlavaVideoForConditionalGeneration
        from sglang_mminfer.families.llava_video.processor import LlavaVideoProcessor

        return LlavaVideoForConditionalGeneration, LlavaVideoProcessor

    def chat_template(self, config: Any) -> str:
        """ChatML as the evaluation has it: `<image>`, a newline, the words; the processor adds what follows a video."""
        from sglang_mminfer.families.own.chat_templates import chatml

        return chatml("You are a helpful assistant.", after_image="\\n")

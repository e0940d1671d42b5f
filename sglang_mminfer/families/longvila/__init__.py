"""LongVILA (arXiv 2408.10188): qwen2-7b-longvila-256f and -1M, their Llama-3 forerunners, and LongVILA-R1.

SigLIP's patches of each frame are merged 2 x 2 (or 3 x 3) and projected. A frame of 448 pixels has 16 x 16 tokens, a
frame of 384 has 14 x 14. After each frame stands one ordinary token, a newline. Language model, tower and projector lie
in folders of their own, and the tokenizer in that of the language model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_mminfer.families.own.family import OwnFamily

if TYPE_CHECKING:
    from sglang_mminfer.families.own.checkpoint import Checkpoint

LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


class LongVILA(OwnFamily):
    """LongVILA from its original checkpoints."""

    model_types = ("longvila",)
    why = "SGLang knows neither its config nor its folders."
    architectures = ("LlavaLlamaModel", "VILAForCausalLM")  # the second is LongVILA-R1's

    def read_config(self, root: dict[str, Any], files: Checkpoint) -> Any:
        """None for a checkpoint of the same architecture that has no folders: another LLaVA."""
        from sglang_mminfer.families.longvila.config import read, vila_style

        vila = vila_style(root, files)
        return None if vila is None else read(vila, files)

    def classes(self) -> tuple[type, type]:
        from sglang_mminfer.families.longvila.model import LongVilaForConditionalGeneration
        from sglang_mminfer.families.longvila.processor import LongVilaProcessor

        return LongVilaForConditionalGeneration, LongVilaProcessor

    def chat_template(self, config: Any) -> str:
        """The language model's template, with nothing between a medium and the words after it."""
        from sglang_mminfer.families.own.chat_templates import chatml, llama_3

        if config.text_config.model_type == "llama":
            return llama_3(LLAMA_3_SYSTEM)
        return chatml("You are a helpful assistant")

    def tokenizer_folder(self, config: Any) -> str:
        return "llm"

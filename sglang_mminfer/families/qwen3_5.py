"""Qwen3.5 and Qwen3.6, dense and MoE.

Media are laid out as in Qwen3-VL, whose processor SGLang uses for them. A quarter of the language model's layers is
full attention, which can be sparse; the others are gated delta nets, which SGLang runs.
"""

from __future__ import annotations

from sglang_mminfer.families.qwen3_vl import Qwen3VL


class Qwen35(Qwen3VL):
    """Qwen3.5, Qwen3.6 and their MoE models: both series have these model types."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    why = "Media lie as in Qwen3-VL; only the full-attention layers, a quarter of all, can be sparse."

"""The model families that the server is tested with, and what holds for each: one table.

Tests run over it, and a support matrix says what they ran. Checkpoints are tiny and random, with the files, keys
and configs of released ones; see each family's module.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QWEN_GRID = ("boundaries", "frame grid", "row grid")


@dataclass(frozen=True)
class Family:
    """One family as SGLang serves it.

    Attributes:
        name: of tests.
        title: of released models.
        architecture: what their config.json names.
        geometry: what `family_of` gives for their config.
        module: the module here that holds `maker` and `oracle`: functions of the checkpoint's folder.
        oracle_title: what answers are compared with, in words.
        images, video, several_videos: what a turn may hold.
        cached_turns: whether a turn finds the turns before it in the radix cache.
        lone_image: whether an image that is the only one of a prompt is laid out otherwise than one of several, so
            that a second image ends the cached prefix at the first.
        chunked_prefill: whether a prompt is prefilled in chunks.
        patterns: what its rasters allow.
        long_video, long_videos: frames, width, height and frames a second of a video, and how many of it make a
            prompt of more than 3,000 tokens.
        flags: what its server needs beside the usual.
    """

    name: str
    title: str
    architecture: str
    geometry: str
    module: str
    maker: str
    oracle: str
    oracle_title: str
    images: bool = True
    video: bool = True
    several_videos: bool = True
    cached_turns: bool = True
    lone_image: bool = False
    chunked_prefill: bool = True
    patterns: tuple[str, ...] = QWEN_GRID
    long_video: tuple[int, int, int, float] = (64, 160, 160, 2)
    long_videos: int = 1
    flags: tuple[str, ...] = ()

    def make(self, path: str | os.PathLike[str]) -> Path:
        """Writes a tiny checkpoint to the folder `path` and returns it."""
        return self._function(self.maker)(path)

    def make_oracle(self, path: str | os.PathLike[str]) -> Any:
        """What must be answered: an object with `answer(messages, max_new_tokens)`."""
        return self._function(self.oracle)(path)

    def _function(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen3_vl",
        title="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        geometry="qwen3_vl",
        module="qwen3_vl",
        maker="make",
        oracle="oracle",
        oracle_title="transformers",
    ),
    Family(
        name="qwen3_vl_moe",
        title="Qwen3-VL-MoE",
        architecture="Qwen3VLMoeForConditionalGeneration",
        geometry="qwen3_vl",
        module="qwen3_vl",
        maker="make_moe",
        oracle="oracle",
        oracle_title="transformers",
    ),
    Family(
        name="internvl",
        title="InternVL3.5",
        architecture="InternVLChatModel",
        geometry="internvl:4",
        module="internvl",
        maker="make",
        oracle="oracle",
        oracle_title="transformers (InternVLForConditionalGeneration, the same weights under other names)",
        long_video=(40, 128, 96, 4),
        long_videos=4,
        flags=("--mm-process-config", '{"video": {"num_frames": 34}}'),  # above SGLang's own limit of 32
    ),
    Family(
        name="llava_onevision",
        title="LLaVA-OneVision (Hugging Face)",
        architecture="LlavaOnevisionForConditionalGeneration",
        geometry="llava_hf",
        module="llava_hf",
        maker="make_onevision",
        oracle="oracle",
        oracle_title="transformers",
        several_videos=False,  # transformers takes several only of one length
        cached_turns=False,  # SGLang turns both off for media in its Transformers fallback
        chunked_prefill=False,
        long_video=(400, 64, 64, 24),
    ),
    Family(
        name="llava_next_video",
        title="LLaVA-NeXT-Video (Hugging Face)",
        architecture="LlavaNextVideoForConditionalGeneration",
        geometry="llava_hf",
        module="llava_hf",
        maker="make_next_video",
        oracle="oracle",
        oracle_title="transformers",
        several_videos=False,
        cached_turns=False,
        chunked_prefill=False,
        long_video=(400, 64, 64, 24),
    ),
    Family(
        name="llava_onevision_lmms",
        title="LLaVA-OneVision (lmms-lab)",
        architecture="LlavaQwenForCausalLM",
        geometry="llava_original",
        module="llava_original",
        maker="make_onevision",
        oracle="oracle",
        oracle_title="transformers (SiglipVisionModel and Qwen2ForCausalLM, the steps between them in plain loops)",
        video=False,  # SGLang answers a video with an error
        several_videos=False,
        lone_image=True,
        flags=("--chat-template", "chatml-llava"),
    ),
    Family(
        name="llava_v1_5",
        title="LLaVA-1.5 (original)",
        architecture="LlavaLlamaForCausalLM",
        geometry="llava_original",
        module="llava_original",
        maker="make_v1_5",
        oracle="oracle",
        oracle_title="transformers (CLIPVisionModel and LlamaForCausalLM, the steps between them in plain loops)",
        video=False,
        several_videos=False,
        chunked_prefill=False,  # SGLang turns it off for this architecture
        flags=("--chat-template", "vicuna_v1.1"),
    ),
)

"""The model families that the server is tested with, and what holds for each: one table.

Tests run over it, and a support matrix says what they ran. Checkpoints are tiny and random, with the files, keys
and configs of released ones; see each family's module.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RASTER = ("boundaries", "frame grid", "row grid")
MERGED = ("boundaries", "frame grid")


@dataclass(frozen=True)
class Family:
    """One family as SGLang serves it with this plugin.

    Attributes:
        name: of tests.
        title: of released models.
        architecture: what their config.json names.
        geometry: what `family_of` gives for their config.
        module: the module here that holds `maker` and `oracle`.
        maker: a function of the checkpoint's folder, and of `recipe`.
        oracle: a function of that folder and of `video_options`.
        oracle_title: what answers are compared with, in words.
        served_by: "SGLang" for its own model class, "fallback" for its class around any of transformers, "plugin"
            for one of this package.
        images, video, several_videos: what a turn may hold.
        cached_turns: whether a turn finds the turns before it in the radix cache.
        lone_image: whether an image that is the only one of a prompt is laid out otherwise than one of several, so
            that a second image ends the cached prefix at the first.
        chunked_prefill: whether a prompt is prefilled in chunks.
        tensor_parallel: whether it runs on several ranks.
        patterns: what its rasters allow.
        one_frame: what a client is told whose video has a single frame; empty where that is served.
        reach: tokens that hold two videos and a picture of the tests, and leave a long prompt sparse.
        long_video, long_videos: frames, width, height and frames a second of a video, and how many of it make a
            prompt of more than 1.2 times `reach`.
        video_options: of --mm-process-config for its server.
        flags: what its server needs beside the usual.
    """

    name: str
    title: str
    architecture: str
    geometry: str
    module: str
    oracle_title: str
    maker: str = "make"
    oracle: str = "oracle"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    served_by: Literal["SGLang", "fallback", "plugin"] = "SGLang"
    images: bool = True
    video: bool = True
    several_videos: bool = True
    cached_turns: bool = True
    lone_image: bool = False
    chunked_prefill: bool = True
    tensor_parallel: bool = True
    patterns: tuple[str, ...] = RASTER
    one_frame: str = ""
    reach: int = 2432
    long_video: tuple[int, int, int, float] = (64, 160, 160, 2)
    long_videos: int = 1
    video_options: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def make(self, path: str | os.PathLike[str]) -> Path:
        """Writes a tiny checkpoint to the folder `path` and returns it."""
        return self._function(self.maker)(path, **self.recipe)

    def make_oracle(self, path: str | os.PathLike[str]) -> Any:
        """What must be answered: an object with `answer(messages, max_new_tokens)`."""
        return self._function(self.oracle)(path, dict(self.video_options))

    def _function(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen2_5_vl",
        title="Qwen2.5-VL",
        architecture="Qwen2_5_VLForConditionalGeneration",
        geometry="qwen_vl",
        module="qwen2_5_vl",
        oracle_title="transformers",
        one_frame="nframes should in interval",
        video_options={"max_frames": 48},
    ),
    Family(
        name="qwen3_vl",
        title="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        geometry="qwen3_vl",
        module="qwen3_vl",
        oracle_title="transformers",
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
    ),
    Family(
        name="qwen3_vl_moe",
        title="Qwen3-VL-MoE",
        architecture="Qwen3VLMoeForConditionalGeneration",
        geometry="qwen3_vl",
        module="qwen3_vl",
        maker="make_moe",
        oracle_title="transformers",
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
    ),
    Family(
        name="internvl",
        title="InternVL3.5",
        architecture="InternVLChatModel",
        geometry="internvl:4",
        module="internvl",
        oracle_title="transformers (InternVLForConditionalGeneration, the same weights under other names)",
        long_video=(40, 128, 96, 4),
        long_videos=4,
        video_options={"num_frames": 34},  # above SGLang's own limit of 32
    ),
    Family(
        name="nvila",
        title="NVILA",
        architecture="NVILAForConditionalGeneration",
        geometry="nvila:4",
        module="nvila",
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        long_video=(40, 128, 96, 4),
        long_videos=11,
        video_options={"num_frames": 20},  # SGLang takes 8 by itself
        flags=("--trust-remote-code",),  # released checkpoints bring their processor along
    ),
    Family(
        name="nvila_lite",
        title="NVILA-Lite",
        architecture="NVILALiteForConditionalGeneration",
        geometry="nvila:4",
        module="nvila",
        maker="make_lite",
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        long_video=(40, 128, 96, 4),
        long_videos=11,
        video_options={"num_frames": 20},  # SGLang takes 8 by itself
        flags=("--trust-remote-code",),  # released checkpoints bring their processor along
    ),
    Family(
        name="llava_onevision_lmms",
        title="LLaVA-OneVision (lmms-lab)",
        architecture="LlavaQwenForCausalLM",
        geometry="llava_original",
        module="llava_original",
        maker="make_onevision",
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        video=False,  # SGLang answers a video with an error
        several_videos=False,
        reach=1664,  # of three pictures
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
        oracle_title="transformers (CLIP, Llama), and the steps between them written out",
        video=False,
        several_videos=False,
        reach=1664,  # of three pictures
        chunked_prefill=False,  # SGLang turns it off for this architecture
        flags=("--chat-template", "vicuna_v1.1"),
    ),
    Family(
        name="llava_onevision",
        title="LLaVA-OneVision (Hugging Face)",
        architecture="LlavaOnevisionForConditionalGeneration",
        geometry="llava_hf",
        module="llava_hf",
        maker="make_onevision",
        oracle_title="transformers",
        served_by="fallback",
        cached_turns=False,  # SGLang turns both off for media in its Transformers fallback
        chunked_prefill=False,
        long_video=(400, 64, 64, 24),
        long_videos=8,
        video_options={"num_frames": 64},  # transformers takes several videos only of one length
    ),
    Family(
        name="llava_next_video",
        title="LLaVA-NeXT-Video (Hugging Face)",
        architecture="LlavaNextVideoForConditionalGeneration",
        geometry="llava_hf",
        module="llava_hf",
        maker="make_next_video",
        oracle_title="transformers",
        served_by="fallback",
        cached_turns=False,
        chunked_prefill=False,
        long_video=(400, 64, 64, 24),
        long_videos=12,
        video_options={"num_frames": 64},
    ),
    Family(
        name="llava_video",
        title="LLaVA-Video",
        architecture="LlavaQwenForCausalLM",
        geometry="placed",
        module="llava_video",
        oracle="LlavaVideoOracle",
        recipe={"mm_spatial_pool_mode": "average"},
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        served_by="plugin",
        reach=3328,
        long_videos=6,
        video_options={"max_frames": 4},
    ),
    Family(
        name="longvila",
        title="LongVILA",
        architecture="LlavaLlamaModel",
        geometry="placed",
        module="longvila",
        oracle="LongVilaOracle",
        recipe={"variant": "1M"},
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        served_by="plugin",
        long_videos=4,
        video_options={"num_frames": 5},
    ),
    Family(
        name="videochat_flash",
        title="VideoChat-Flash (UMT-L)",
        architecture="VideoChatFlashQwenForCausalLM",
        geometry="placed:merged",
        module="videochat_flash",
        oracle="VideoChatFlashOracle",
        recipe={"mm_vision_tower": "umt-large"},
        oracle_title="transformers (Qwen2), the rest written out; the tower against outputs of the original",
        served_by="plugin",
        patterns=MERGED,
        long_videos=12,
        video_options={"min_frames": 4, "max_frames": 16},
    ),
    Family(
        name="videochat_flash_1b",
        title="VideoChat-Flash (InternVideo2-1B)",
        architecture="VideoChatFlashQwenForCausalLM",
        geometry="placed:merged",
        module="videochat_flash",
        oracle="VideoChatFlashOracle",
        recipe={"mm_vision_tower": "internvideo2", "model_type": "qwen2"},  # the type of a released checkpoint
        oracle_title="transformers (Qwen2), the rest written out; the tower against outputs of the original",
        served_by="plugin",
        patterns=MERGED,
        long_videos=12,
        video_options={"min_frames": 4, "max_frames": 16},
    ),
)

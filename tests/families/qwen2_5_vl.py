"""Tiny Qwen2.5-VL and Qwen2-VL, and transformers' own classes as the oracle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from families import Family, Prompt, with_options
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random Qwen2.5-VL to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_tiny_qwen2_5_vl(path, layers=2, heads=8, kv_heads=2, head_dim=16, vision_full_blocks=1)


def make_qwen2_vl(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random Qwen2-VL to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_tiny_qwen2_vl(path, layers=2, heads=8, kv_heads=2, head_dim=16)


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    maker=make,
    oracle=with_options(HFOracle),
    oracle_title="transformers",
    one_frame="nframes should in interval",
    video_options={"max_frames": 48},
    prompt=Prompt("qwen_vl", *tiny_model.PLACEHOLDERS, ("image", "video")),
)

FAMILIES = (
    QWEN2_5_VL,
    replace(
        QWEN2_5_VL,
        name="qwen2_vl",
        title="Qwen2-VL",
        architecture="Qwen2VLForConditionalGeneration",
        maker=make_qwen2_vl,
    ),
)

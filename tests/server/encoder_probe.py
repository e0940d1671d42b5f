"""How many patches each rank's vision encoder gets: a plugin for SGLang that writes a JSON line about each call.

`install` makes a distribution of it, which a server finds on its PYTHONPATH.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import probe

FILE = "SGLANG_MMINFER_TEST_ENCODER"

TOWERS = (
    "sglang.srt.models.qwen2_5_vl.Qwen2_5_VisionTransformer.forward",
    "sglang.srt.models.qwen3_vl.Qwen3VLMoeVisionModel.forward",
)


def install(folder: Path) -> str:
    """Makes the distribution in `folder`. Returns the PYTHONPATH of a server that loads the probe."""
    return probe.distribution(folder, "encoder_probe")


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for tower in TOWERS:
        HookRegistry.register(tower, encodes, HookType.BEFORE)


def encodes(self: Any, x: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE a vision tower's forward."""
    from sglang.srt.runtime_context import get_parallel

    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps({"rank": get_parallel().attn_tp_rank, "patches": len(x)}) + "\n")

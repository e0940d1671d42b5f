"""SGLang's media processors of models whose limits or mistakes stand in the way of long video.

Each class here is SGLang's own with little changed, made when SGLang makes the processor of such a model and not
before: `mends.processor` is the hook, `mends.MENDS` says why. The number of frames is SGLang's own option for video,
which these processors do not read:

    --mm-process-config '{"video": {"num_frames": 256}}'
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from sglang_mminfer import mends

NUM_FRAMES = "num_frames"

_ADAPTED = {
    "InternVLProcessor": ("internvl", "internvl_frames"),
    "LlavaImageProcessor": ("llava_original", "llava_original"),
    "NVILAMultimodalProcessor": ("nvila", "nvila_videos"),
    "QwenVLImageProcessor": ("qwen_vl", None),
    "TransformersAutoMultimodalProcessor": ("llava_hf", "llava_hf_videos"),
}
"""By SGLang's class, the module here whose `adapted` makes ours, imported then and not with this file, and the mend
that it is (None: several, which it asks for one by one)."""


def adapted(kind: type, hf_config: Any) -> type:
    """Our class in place of one that `_ADAPTED` names; any other class as it is."""
    module, mend = _ADAPTED.get(kind.__name__, (None, None))
    if module is None or (mend is not None and not mends.active(mend)):
        return kind
    family = importlib.import_module(f"{__name__}.{module}")
    return family.adapted(kind, hf_config) or kind


def frames_wanted(video_config: dict[str, Any]) -> int | None:
    """`num_frames` of --mm-process-config's video, None if it is not there.

    Raises:
        ValueError: if it is no positive integer.
    """
    wanted = video_config.get(NUM_FRAMES)
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"--mm-process-config: video: {NUM_FRAMES}: expected an integer >= 1, got {wanted!r}")
    return wanted


def fresh_numbers(count: int) -> range:
    """A number for each of `count` media of a request, which those of no other request have.

    A session puts the items of its requests behind each other.
    """
    first = int.from_bytes(os.urandom(7))
    return range(first, first + count)

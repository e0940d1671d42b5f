"""SGLang's media processors of models whose limits or mistakes stand in the way of long video.

Each class here is SGLang's own with little changed, made when SGLang asks for the processor of such a model and
not before: `adapt` is the hook, `plugin.HOOKS` says why. The number of frames is SGLang's own option for video,
which these processors do not read:

    --mm-process-config '{"video": {"num_frames": 256}}'
"""

from __future__ import annotations

import importlib
import os
from typing import Any

NUM_FRAMES = "num_frames"

_ADAPTED = {
    "InternVLProcessor": "internvl",
    "LlavaImageProcessor": "llava_original",
    "NVILAMultimodalProcessor": "nvila",
    "TransformersAutoMultimodalProcessor": "llava_hf",
}
"""By SGLang's class, the module here whose `adapted` makes ours: imported then and not with this file."""


def adapt(kind: type | None, *args: Any, **kwargs: Any) -> type | None:
    """AFTER get_mm_processor_cls: our class in place of one that `_ADAPTED` names, else None (SGLang's stays)."""
    from sglang_mminfer.plugin import adapts_media

    if kind is None or not adapts_media():
        return None
    module = _ADAPTED.get(kind.__name__)
    if module is None:
        return None
    family = importlib.import_module(f"{__name__}.{module}")
    return family.adapted(kind, args[0] if args else kwargs["hf_config"])


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

"""The number of frames of a video, for families whose processor in SGLang does not read SGLang's own option for it:

    --mm-process-config '{"video": {"num_frames": 256}}'

A family's class is SGLang's own with a few changes. It is made when SGLang makes the processor of such a model:
`families.processors` has the hook, and `mends.MENDS` says why.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any, ClassVar

NUM_FRAMES = "num_frames"


def frames_wanted(video_config: dict[str, Any]) -> int | None:
    """`num_frames` of the video options in --mm-process-config; None if it is not given.

    Raises:
        ValueError: if it is no positive integer.
    """
    wanted = video_config.get(NUM_FRAMES)
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"--mm-process-config: video: {NUM_FRAMES}: expected an integer >= 1, got {wanted!r}")
    return wanted


VIDEO_OPTIONS = frozenset({"fps", "max_frames", "num_frames"})
"""The options that a request may set for one video of such a family; see `mends.options`."""


@cache
def counting_frames(base: Any, usual: int | None = None) -> Any:
    """A subclass of `base`, SGLang's class, that takes a number of frames of each video, from its first to its last.

    `base` is its only base class, because an instance of SGLang's class changes its class to this one.

    Args:
        usual: the number of frames if neither request nor operator sets it; None: as many as SGLang takes.
    """

    class CountsFrames(base):
        REQUEST_OPTIONS: ClassVar[dict[str, frozenset[str]]] = {"video": VIDEO_OPTIONS}

        @cached_property
        def num_frames(self) -> int | None:
            return frames_wanted(self.video_config) or usual

        def check_options(self) -> None:
            """Raises ValueError if an option of --mm-process-config is wrong."""
            _ = self.num_frames

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            """The number of placeholders in a prompt for each kind of medium."""
            tokens = {"image": self.mm_tokens.image_token, "video": self.mm_tokens.video_token}
            return {kind: prompt.count(token) for kind, token in tokens.items() if token}

    return CountsFrames


def count_for(video: Any, usual: int) -> int:
    """How many frames to take of a video: as many as its request says, else `usual`.

    Raises:
        ValueError: for more frames than a request may ask for, or than are held in memory (`mends.limits`).
    """
    from sglang_mminfer.mends import limits, options

    rate = float(getattr(video, "avg_fps", 0) or 0)
    count = options.count_of_frames(options.on(video), usual, len(video), rate)
    if hasattr(video, "frame_shape"):
        height, width = video.frame_shape
        limits.check_frames(count, width, height)
    return count

"""SGLang's media processors of models whose limits or mistakes stand in the way of long video.

Each class here is SGLang's own with little changed, made when SGLang makes the processor of such a model and not
before: `families.processors` has the hook, `mends.MENDS` says why. The number of frames is SGLang's own option for
video, which these processors do not read:

    --mm-process-config '{"video": {"num_frames": 256}}'
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any, ClassVar

NUM_FRAMES = "num_frames"


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


VIDEO_OPTIONS = frozenset({"fps", "max_frames", "num_frames"})
"""What a request may say of one video to a family that `counting_frames` is for; see `mends.options`."""


@cache
def counting_frames(base: Any, usual: int | None = None) -> Any:
    """SGLang's class of a family that takes a number of frames of each video, from its first to its last.

    A class in one line with `base`, and no base beside it: an object of SGLang's class becomes one of ours.

    Args:
        usual: how many frames where nobody says it; None for as many as SGLang takes.
    """

    class CountsFrames(base):
        REQUEST_OPTIONS: ClassVar[dict[str, frozenset[str]]] = {"video": VIDEO_OPTIONS}

        @cached_property
        def num_frames(self) -> int | None:
            return frames_wanted(self.video_config) or usual

        def check_options(self) -> None:
            """Raises ValueError for options of --mm-process-config that the family cannot have."""
            _ = self.num_frames

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            """How many placeholders a prompt has for each kind of medium."""
            tokens = {"image": self.mm_tokens.image_token, "video": self.mm_tokens.video_token}
            return {kind: prompt.count(token) for kind, token in tokens.items() if token}

    return CountsFrames


def count_for(video: Any, usual: int) -> int:
    """How many frames to take of a video: as its request says, else `usual`.

    Raises:
        ValueError: for more than the server takes, or holds at one time.
    """
    from sglang_mminfer.mends import limits, options

    rate = float(getattr(video, "avg_fps", 0) or 0)
    count = options.count_of_frames(options.on(video), usual, len(video), rate)
    if hasattr(video, "frame_shape"):
        height, width = video.frame_shape
        limits.check_frames(count, width, height)
    return count

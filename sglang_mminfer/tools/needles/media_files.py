"""A conversation with needles as a user would send it: video and image files, and OpenAI messages with the answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from sglang_mminfer.tools.media import write_video
from sglang_mminfer.tools.needles.pictures import TILE, haystack, put_card
from sglang_mminfer.tools.needles.sequence import card_of, hay_text
from sglang_mminfer.tools.needles.task import Conversation, Part, Turn

SMALLEST, LARGEST_IMAGE, LARGEST_VIDEO = 16 * 28 * 28, 1280 * 28 * 28, 768 * 28 * 28

MM_PROCESS_CONFIG: dict[str, dict[str, Any]] = {
    "video": {"min_pixels": SMALLEST, "max_pixels": 4 * SMALLEST, "fps": 2.0, "max_frames": 8192}
}
"""The server's --mm-process-config with which the model sees every frame of a file of 2 frames per second, each at its
own size of 112 x 112. By default SGLang enlarges small frames to 128 tokens and takes at most 768 frames."""

FPS = 2.0
"""Frames per second of the files, and of --mm-process-config: the model sees every frame; a pair lasts one second."""


def frames_of(part: Part, bank_seed: int = 0) -> np.ndarray:
    """The frames of an image or a video, cards included: uint8 [frames, side, side, 3]."""
    frames = haystack(1 if part.kind == "image" else 2 * part.size, part.side, part.seed)
    for i, needle in enumerate(part.needles):
        pair, cell = needle.slot
        put_card(frames[2 * pair : 2 * pair + 2], cell, card_of(part, i, bank_seed))
    return frames


def write_part(part: Part, folder: Path, name: str, bank_seed: int = 0) -> Path:
    """Write an image (PNG) or a video (mp4, H.264) and return its path."""
    frames = frames_of(part, bank_seed)
    if part.kind == "video":
        return write_video(folder / f"{name}.mp4", frames, TILE, TILE, FPS)
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.png"
    Image.fromarray(frames[0]).save(target)
    return target


def user_message(turn: Turn, folder: str | os.PathLike[str], name: str, bank_seed: int = 0) -> dict[str, Any]:
    """The user's message of a turn. Media are written to `folder`, under names that begin with `name`."""
    content: list[dict[str, Any]] = []
    for i, part in enumerate(turn.parts):
        if part.kind == "text":
            content.append({"type": "text", "text": " " + " ".join(hay_text(part))})
        else:
            url = os.fspath(write_part(part, Path(folder), f"{name}-{i}", bank_seed).resolve())
            content.append({"type": f"{part.kind}_url", f"{part.kind}_url": {"url": url}})
    content.append({"type": "text", "text": ("\n" if turn.parts else "") + turn.question})
    return {"role": "user", "content": content}


def messages(
    conversation: Conversation, folder: str | os.PathLike[str], name: str = "needle", bank_seed: int = 0
) -> list[dict[str, Any]]:
    """All turns with the right answers between them. Turn i is message 2 * i; its prompt is messages[: 2 * i + 1]."""
    chat: list[dict[str, Any]] = []
    for i, turn in enumerate(conversation.turns):
        chat.append(user_message(turn, folder, f"{name}-{i}", bank_seed))
        chat.append({"role": "assistant", "content": turn.answer})
    return chat

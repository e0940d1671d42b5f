"""m-RoPE positions of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and Qwen3-Omni by the rule of the released model code.

The oracle has its own copy of the rule, because both others differ: in transformers, text after a video continues
behind the video's rows and columns even if its time went further; SGLang takes the seconds that it is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Grid = tuple[int, int, int]
"""Steps in time, rows and columns of a medium, in patches."""

STEPS_APART = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Model types for which each step of a video is a picture of its own, behind its time in words."""

_OMNI = "qwen3_omni_moe_thinker"


@dataclass(frozen=True)
class Rule:
    """What a model's config says about positions.

    Attributes:
        image, video: the token ids of the placeholders.
        merge: patches along one side of a token.
        tokens_per_second: how many positions a second of video takes. None for models that count time in steps
            (Qwen2-VL) and for models with `steps_apart`.
        steps_apart: whether each step of a video is a picture of its own, behind its time in words (`STEPS_APART`).
        fractions: whether the time of a step is not cut to a whole position, so that all that comes behind the video
            may have a fraction, too (Qwen3-Omni).
    """

    image: int
    video: int
    merge: int
    tokens_per_second: float | None
    steps_apart: bool
    fractions: bool = False

    @classmethod
    def of(cls, config: Any) -> Rule:
        """The rule of a model, from its transformers config.

        Raises:
            ValueError: the model type is not one of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and Qwen3-Omni's thinker.
        """
        kind = config.model_type
        known = ("qwen2_vl", "qwen2_5_vl", _OMNI, *STEPS_APART)
        if kind not in known:
            raise ValueError(f"m-RoPE: expected {', '.join(known)}, got {kind!r}")
        rates = {
            "qwen2_5_vl": lambda: config.vision_config.tokens_per_second,
            _OMNI: lambda: config.position_id_per_seconds,
        }
        return cls(
            image=config.image_token_id,
            video=config.video_token_id,
            merge=config.vision_config.spatial_merge_size,
            tokens_per_second=rates[kind]() if kind in rates else None,
            steps_apart=kind in STEPS_APART,
            fractions=kind == _OMNI,
        )


def positions(
    ids: Sequence[int],
    rule: Rule,
    images: Sequence[Grid] = (),
    videos: Sequence[Grid] = (),
    seconds: Sequence[float] = (),
) -> torch.Tensor:
    """Time, row and column of each token: [3, len(ids)], int64, or float32 if the rule has `fractions`.

    Args:
        ids: the prompt's token ids, with one placeholder for each token of a medium.
        images, videos: grids in the order of the prompt.
        seconds: for each video, the seconds from one step in time to the next; needed if the rule has
            `tokens_per_second`.

    Raises:
        ValueError: placeholders and grids do not fit.
    """
    media = {rule.image: _pictures(images, rule), rule.video: _steps(videos, seconds, rule)}
    word, nothing = torch.zeros(3, 1, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64)
    parts: list[torch.Tensor] = []
    token = 0
    next_position: int | float = 0
    while token < len(ids):
        part = next(media[ids[token]], nothing) if ids[token] in media else word
        tokens = part.shape[1]
        if part is not word and (not tokens or list(ids[token : token + tokens]) != [ids[token]] * tokens):
            raise ValueError(f"m-RoPE: placeholders from token {token} on do not fit the grids {images} and {videos}")
        parts.append(part + next_position)
        token += tokens
        next_position = parts[-1].max().item() + 1  # whatever comes next starts after the highest position
    if any(next(raster, None) is not None for raster in media.values()):
        raise ValueError(f"m-RoPE: the prompt has fewer placeholders than the grids {images} and {videos}")
    return torch.cat(parts, dim=1)


def _pictures(grids: Sequence[Grid], rule: Rule) -> Iterator[torch.Tensor]:
    for frames, height, width in grids:
        yield _raster(torch.arange(frames), height // rule.merge, width // rule.merge)


def _steps(grids: Sequence[Grid], seconds: Sequence[float], rule: Rule) -> Iterator[torch.Tensor]:
    """[3, tokens] for each run of video placeholders."""
    if rule.tokens_per_second is not None and len(seconds) != len(grids):
        raise ValueError(f"m-RoPE: expected the seconds of {len(grids)} videos, got {len(seconds)}")
    for i, (steps, height, width) in enumerate(grids):
        rows, columns = height // rule.merge, width // rule.merge
        if rule.steps_apart:
            for _ in range(steps):
                yield _raster(torch.zeros(1, dtype=torch.int64), rows, columns)
        elif rule.tokens_per_second is not None:
            # In fp32, as in the released code: the product is truncated, so its rounding matters near whole numbers.
            time = torch.arange(steps) * torch.tensor(seconds[i], dtype=torch.float32) * rule.tokens_per_second
            yield _raster(time if rule.fractions else time.long(), rows, columns)
        else:
            yield _raster(torch.arange(steps), rows, columns)


def _raster(time: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[3, len(time) * rows * columns]"""
    space = [torch.arange(count, dtype=time.dtype) for count in (rows, columns)]
    axes = torch.meshgrid(time, *space, indexing="ij")
    return torch.stack([axis.flatten() for axis in axes])

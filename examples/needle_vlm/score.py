"""Which questions a needle model answers correctly, in this process and under any mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import network
from sglang_mminfer.tools.needles import sequence, task


def vision_rows(item: sequence.Sequence, vocabulary: sequence.Vocabulary) -> torch.Tensor:
    """bool [tokens]: True for the rows of images and videos."""
    ids = torch.from_numpy(item.ids)
    return (ids == vocabulary.video_pad) | (ids == vocabulary.image_pad)


def tri_shape(vision: torch.Tensor, sink: int, local: int) -> torch.Tensor:
    """bool [tokens, tokens]: text rows see everything before them, vision rows see a sink and a local window.

    Plain needles survive this mask, because only the question's rows look for them. Relays do not: a relay's own row
    does not find the needle that the relay names.
    """
    position = torch.arange(len(vision))
    distance = position[:, None] - position[None]
    return (distance >= 0) & ((distance < local) | (position[None] < sink) | ~vision[:, None])


@torch.no_grad()
def answered(
    model: Any, item: sequence.Sequence, vocabulary: sequence.Vocabulary, mask: torch.Tensor | None
) -> np.ndarray:
    """bool [questions]: whether each answer is right, among all tokens of the vocabulary.

    Each question follows the right answers of the earlier turns.
    """
    embeddings = model.model.language_model.embed_tokens(torch.from_numpy(item.ids))
    vision = torch.from_numpy(item.vision)
    for start in range(0, len(item.windows), 128):
        part = slice(start, start + 128)
        cells = network.encode_windows(
            model, sequence.normalized(item.windows[part]), torch.from_numpy(item.corners[part])
        )
        embeddings[vision[16 * start : 16 * start + len(cells)]] = cells
    states = network.run_layers(model, embeddings[None], torch.from_numpy(item.positions)[:, None], mask)
    rows = states[-1][0, torch.from_numpy(item.answers[:, 1])]
    logits = network.answer_logits(model, rows, torch.arange(model.lm_head.weight.shape[0]))
    digits = np.array([vocabulary.digit[digit] for digit in task.DIGITS])
    return logits.argmax(-1).numpy() == digits[item.answers[:, 2]]


def far_relays(item: sequence.Sequence, local: int) -> dict[int, bool]:
    """The index of a relay's key -> whether the needle that the relay names lies outside the local window."""
    tokens = {int(left): int(token) for token, left, *_ in item.needles}
    return {
        int(left): int(token) - tokens[int(right)] >= local for token, left, right, _, relay in item.needles if relay
    }

"""Synthetic heads whose attention is known, and the conversation that they look at.

A head is a random rotation and what it looks for; a draw of it is one conversation's q, k and v. So two draws of a head
are what one head of a model makes of two conversations: the same directions, other contents. Every q and k has noise
in all directions, which alone spreads logits by NOISE, and meets what is planted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid

ROWS, COLS, TEXT = 12, 16, 64
"""Tokens of a column and of a row of a frame, and of the text before and after the video."""

NOISE = 0.4
"""Standard deviation of logits that noise of q and of k makes by itself."""

PLANTED = 15.0
"""The logit of what a row looks for, beside logits of about 0."""

SINK = 7.5
"""The logit of the first four keys, which together weigh as much as several thousand others."""


def conversation(tokens: int) -> ModalityMap:
    """Text, a video of at most so many tokens with the text, and text."""
    frames = (tokens - 2 * TEXT) // (ROWS * COLS)
    starts = tuple(TEXT + i * ROWS * COLS for i in range(frames))
    stop = starts[-1] + ROWS * COLS
    return ModalityMap(
        [
            Segment(Modality.TEXT, 0, TEXT),
            Segment(Modality.VIDEO, TEXT, stop, VisionGrid(frames, ROWS, COLS, starts)),
            Segment(Modality.TEXT, stop, stop + TEXT),
        ]
    )


@dataclass(frozen=True)
class Draw:
    """One head's tensors in one conversation: float32 [tokens, 1, D] each. sm_scale: factor on q . k."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def sm_scale(self) -> float:
        return float(self.q.shape[2]) ** -0.5


Planted = tuple[torch.Tensor, torch.Tensor]
"""What is planted: [tokens, n] for queries and for keys; their product is the logit."""


def grid_line(tokens: int, random: torch.Generator) -> Planted:
    """Rows look at their own cell in all frames, and a little at the cells beside it: sines of row and column."""
    cell = (torch.arange(tokens) - TEXT) % (ROWS * COLS)
    parts = []
    for place, size in ((cell // COLS, ROWS), (cell % COLS, COLS)):
        for frequency, share in ((1, 0.2), (2, 0.3), (4, 0.5)):
            angle = 2 * math.pi * frequency * place / size
            parts.append(math.sqrt(share / 2 * PLANTED) * torch.stack([angle.cos(), angle.sin()], dim=1))
    code = torch.cat(parts, dim=1)
    return code, code


def columns(tokens: int, random: torch.Generator) -> Planted:
    """All rows look at the same 16 keys, anywhere in the video."""
    heavy = torch.zeros(tokens, 1)
    heavy[torch.randperm(tokens - TEXT, generator=random)[:16]] = math.sqrt(PLANTED)
    return torch.full((tokens, 1), math.sqrt(PLANTED)), heavy


def diagonals(tokens: int, random: torch.Generator) -> Planted:
    """Rows look at the key three frames before them: rotations by the position, as RoPE makes them."""
    position, parts = torch.arange(tokens), []
    for frequency in (2.4, 1.1, 0.53, 0.23, 0.071, 0.019):
        parts.append(
            [
                torch.stack([(frequency * at).cos(), (frequency * at).sin()], dim=1) * math.sqrt(PLANTED / 6)
                for at in (position, position + 3 * ROWS * COLS)
            ]
        )
    q, k = (torch.cat(part, dim=1) for part in zip(*parts))
    return q, k


def far_keys(tokens: int, random: torch.Generator) -> Planted:
    """One row of eight looks at one of 64 keys anywhere before it, which carries most of the row's mass, as in a relay.
    The other rows look at nothing but the sink."""
    needles = torch.randperm(tokens - 3 * TEXT, generator=random)[:64] + TEXT
    codes = torch.nn.functional.normalize(torch.randn(64, 8, generator=random), dim=1) * math.sqrt(PLANTED)
    q, k = torch.zeros(2, tokens, 8)
    k[needles] = codes
    for row in torch.randperm(tokens - 2 * TEXT, generator=random)[: tokens // 8] + TEXT:
        before = (needles < row).nonzero().flatten()
        if len(before):
            q[row] = codes[before[int(torch.randint(len(before), (1,), generator=random))]]
    return q, k


def diffuse(tokens: int, random: torch.Generator) -> Planted:
    """Rows look at everything, a little more at some of it: logits vary by about 1."""
    return torch.randn(tokens, 8, generator=random) * 8**-0.25, torch.randn(tokens, 8, generator=random) * 8**-0.25


@dataclass(frozen=True)
class Kind:
    """planted: see `Planted`; None: q and k are random in all directions, and logits vary by 3. sink: the logit of the
    first four keys, which all rows look at."""

    planted: Callable[[int, torch.Generator], Planted] | None
    sink: float = SINK


KINDS = {
    "grid line": Kind(grid_line),
    "columns": Kind(columns),
    "diagonals": Kind(diagonals),
    "single far keys": Kind(far_keys, sink=10),
    "diffuse": Kind(diffuse, sink=0),
    "full rank, random": Kind(None, sink=0),
}


def draw(kind: str, tokens: int, head_dim: int, head: int, number: int) -> Draw:
    """One conversation of one head. head: its seed. number: the seed of the conversation."""
    of_head, random = torch.Generator().manual_seed(head), torch.Generator().manual_seed(1000 * head + number + 1)
    rotation = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=of_head, dtype=torch.float64))[0].float()
    what = KINDS[kind]
    spread = NOISE if what.planted else 3.0
    q, k = torch.randn(2, tokens, head_dim, generator=random) * (spread / head_dim**0.5) ** 0.5
    if what.planted:
        parts = what.planted(tokens, random)
        for x, part in zip((q, k), parts):
            x[:, 1 : 1 + part.shape[1]] += part
    q[:, 0] += what.sink**0.5
    k[:4, 0] += what.sink**0.5
    q, k = q @ rotation * head_dim**0.5, k @ rotation
    return Draw(q[:, None].contiguous(), k[:, None].contiguous(), _values(tokens, head_dim, random)[:, None])


def _values(tokens: int, head_dim: int, random: torch.Generator) -> torch.Tensor:
    """float32 [tokens, D], half of their variance noise, the other half slow along the prompt."""
    waves = torch.randn(32, head_dim, generator=random) * (2 / 32) ** 0.5
    phase = 2 * math.pi * torch.rand(32, generator=random)
    angle = torch.arange(tokens)[:, None] * torch.logspace(-3.5, -1.5, 32) + phase
    return (angle.sin() @ waves + torch.randn(tokens, head_dim, generator=random)) * 0.5**0.5

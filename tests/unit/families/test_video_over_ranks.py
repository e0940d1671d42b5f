"""A video in clips: every patch is in one of them, in its order, and pictures stay whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_mminfer.families.qwen3_vl.model import in_clips

HEIGHT, WIDTH = 4, 6


@pytest.mark.parametrize("frames", [(1,), (2,), (5,), (8, 1, 3)])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_clips_are_the_video(frames: tuple[int, ...], parts: int) -> None:
    grids = torch.tensor([[count, HEIGHT, WIDTH] for count in frames])
    patches = torch.arange(int(grids.prod(dim=1).sum()) * 2).reshape(-1, 2)
    items = [SimpleNamespace(feature=part) for part in patches.split(grids.prod(dim=1).tolist())]
    clips, rows = in_clips(items, grids, parts)
    assert torch.equal(torch.cat([clip.feature for clip in clips]), patches)
    assert [len(clip.feature) for clip in clips] == rows.prod(dim=1).tolist()
    assert rows.dtype == grids.dtype and (rows[:, 1:] == torch.tensor([HEIGHT, WIDTH])).all()
    first = 0
    for count in frames:
        own = rows[first : first + min(parts, count), 0]
        assert own.sum() == count and own.max() - own.min() <= 1
        first += len(own)
    assert first == len(rows)
    assert [item.feature.shape[0] for item in items] == grids.prod(dim=1).tolist(), "the items are as they were"

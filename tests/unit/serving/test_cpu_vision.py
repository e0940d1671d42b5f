"""The CPU's vision attention gives the same result as SGLang's, without a mask of all patches by all patches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.attention.vision import VisionSdpaAttention

from sglang_mminfer.serving.cpu_vision import attend_by_sequence


@pytest.fixture(scope="module")
def stock():
    return getattr(VisionSdpaAttention.forward, "__wrapped__", VisionSdpaAttention.forward)


@pytest.mark.parametrize("lengths", [[64], [64, 64, 64], [16, 64, 16, 7, 1], [5, 0, 5]])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_every_sequence_attends_to_itself_alone(stock, lengths, kv_heads):
    torch.manual_seed(0)
    attention = VisionSdpaAttention(head_dim=8, num_heads=4, num_kv_heads=kv_heads, flatten_batch=True)
    total = sum(lengths)
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, kv_heads, 8), torch.randn(total, kv_heads, 8)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ours = attend_by_sequence(stock, attention, q, k, v, bsz=1, cu_seqlens=cu_seqlens)
    start = 0
    for length in lengths:
        at = slice(start, start + length)
        scores = torch.einsum("qhd,khd->hqk", q[at], k[at].repeat_interleave(4 // kv_heads, 1)) * attention.scale
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[at].repeat_interleave(4 // kv_heads, 1))
        torch.testing.assert_close(ours[at], expected)
        start += length
    if kv_heads == 4:
        torch.testing.assert_close(ours, stock(attention, q, k, v, bsz=1, cu_seqlens=cu_seqlens))


def test_what_it_cannot_split_goes_to_the_stock_attention():
    attention = VisionSdpaAttention(head_dim=8, num_heads=2, num_kv_heads=2, flatten_batch=True)
    q = torch.randn(6, 2, 8)
    asked = []
    attend_by_sequence(lambda *a, **k: asked.append(1), attention, q, q, q, bsz=1, cu_seqlens=None)
    attend_by_sequence(
        lambda *a, **k: asked.append(2), attention, q, q, q, bsz=1, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
    )
    assert asked == [1, 2]

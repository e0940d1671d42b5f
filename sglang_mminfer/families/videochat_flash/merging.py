"""Token merging (ToMe, arXiv 2210.09461): the patches of a clip become 64 tokens by averaging those that are alike.

Each round pairs every token at an even place with the odd one it resembles most, and merges the r pairs that
resemble each other most. The tokens that are left have an order: first even tokens that were not merged, the most alike
first, then all odd ones. So the 64 tokens have no raster, and which pixels a token stands for depends on the picture.

A choice between near-equal pairs may fall either way when the tower rounds differently, and then all tokens of the
clip move. Therefore similarities and sums are fp32 whatever the tower's dtype, ties go to the earlier token, and
nothing is summed in an order that a GPU picks anew each time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rounds(tokens: int, target: int) -> list[int]:
    """How many tokens each round merges away: half of them, until `target` is left.

    Raises:
        ValueError: if there are fewer tokens than the target.
    """
    if tokens < target:
        raise ValueError(f"token merging: expected at least {target} tokens, got {tokens}")
    merged = []
    while tokens > target:
        merged.append(min(tokens // 2, tokens - target))
        tokens -= merged[-1]
    return merged


def merge_tokens(x: torch.Tensor, target: int, heads: int) -> torch.Tensor:
    """Merges the tokens of each clip.

    Args:
        x: [clips, tokens, hidden], from a vision tower.
        target: the number of tokens of each clip after merging.
        heads: the tower's attention heads. Tokens are compared by the mean of their features over the heads.

    Returns:
        [clips, target, hidden], in x's dtype.

    Raises:
        ValueError: if a clip has fewer tokens than the target.
    """
    merged, size = x.float(), torch.ones_like(x[..., :1], dtype=torch.float32)
    for count in rounds(x.shape[1], target):
        merged, size = _merge_round(merged, size, count, heads)
    return merged.to(x.dtype)


def _merge_round(x: torch.Tensor, size: torch.Tensor, count: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One round: the tokens after it, and for each the number of patches that it stands for, [clips, tokens, 1]."""
    metric = x.unflatten(-1, (heads, -1)).mean(dim=2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = order[:, :count], order[:, count:]
    # Which even token goes into which odd one, as a matrix: a product sums in a fixed order, a scatter does not.
    into = F.one_hot(partner.gather(1, merged), x.shape[1] // 2).to(x.dtype).transpose(1, 2)

    def merge(tokens: torch.Tensor) -> torch.Tensor:
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        left = even.gather(1, unmerged[..., None].expand(-1, -1, tokens.shape[-1]))
        moved = even.gather(1, merged[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat([left, odd + into @ moved], dim=1)

    total, weight = merge(x * size), merge(size)
    return total / weight, weight

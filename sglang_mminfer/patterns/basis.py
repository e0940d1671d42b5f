"""Low-rank forms of q . k, and where they come from.

A head's queries and keys fill few directions, so that q . k is about (A q) . (B k) with A and B of few rows. With Cq
and Ck the second moments of its queries and keys, the A and B with the least mean squared error over independent pairs
of both are those of the square-root method of balanced truncation (Laub, Heath, Paige and Ward, 1987):

    U S V' = svd(Cq^1/2 Ck^1/2),    A = S^-1/2 V' Ck^1/2,    B = S^-1/2 U' Cq^1/2,    r rows of each.

The rows come by falling S, so that the first r rows of more are the best form of rank r. No covariance is inverted.

Query heads that share their keys may share B, and so project the keys once. Least squares then gives all of them the
same A, too: that of the sum of their Cq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HeadBasis = tuple[torch.Tensor, torch.Tensor]
"""A and B of one head, [rank, D] each."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Low-rank forms of q . k for the heads of one layer.

    queries, keys: float32 [n, rank, D], A and B. n is the number of KV heads, or of query heads.
    shares: float32 [query heads], on the host: the share of the keys between sink and window that query tiles visit by
        these forms, as measured where they come from; None: it is not known.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    shares: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.queries.ndim != 3 or self.queries.shape != self.keys.shape:
            raise ValueError(
                "Basis: expected queries and keys of one shape [heads, rank, D], "
                f"got {list(self.queries.shape)} and {list(self.keys.shape)}"
            )

    @property
    def rank(self) -> int:
        """The largest rank that it serves."""
        return self.queries.shape[1]

    def to(self, device: torch.device) -> Basis:
        """The same on a device."""
        return Basis(self.queries.to(device), self.keys.to(device), self.shares)

    def number(self, head: int, num_heads: int) -> int:
        """Which of the n forms serves a query head, of so many."""
        return head * len(self.queries) // num_heads

    def part(self, heads: slice, num_heads: int) -> Basis:
        """The forms of some successive query heads, of so many: of whole KV heads, or of a part of one."""
        own = slice(self.number(heads.start, num_heads), self.number(heads.stop - 1, num_heads) + 1)
        shares = None if self.shares is None else self.shares[heads]
        return Basis(self.queries[own], self.keys[own], shares)

    def of_head(self, head: int, num_heads: int) -> HeadBasis:
        """A and B of a query head, of so many."""
        number = self.number(head, num_heads)
        return self.queries[number], self.keys[number]


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """float64 [heads, D, D]: the mean of x x' over tokens. x: [tokens, heads, D]."""
    by_head = x.transpose(0, 1).double()
    return by_head.transpose(1, 2) @ by_head / max(len(x), 1)


def basis_of(q_moments: torch.Tensor, k_moments: torch.Tensor, rank: int, *, shared: bool = True) -> Basis:
    """The basis of one layer from the second moments of a calibration run.

    Args:
        q_moments: float64 [Hq, D, D]; k_moments: float64 [Hkv, D, D], see `second_moments`.
        shared: the query heads of a KV head share a form. False: every query head has its own.

    Raises:
        ValueError: no such rank.
    """
    num_heads, dim = q_moments.shape[:2]
    group = num_heads // len(k_moments)
    if not 1 <= rank <= dim:
        raise ValueError(f"rank: expected 1 to {dim} (the head dimension), got {rank}")
    if shared:
        q_moments = q_moments.unflatten(0, (-1, group)).sum(dim=1)
    else:
        k_moments = k_moments.repeat_interleave(group, dim=0)
    forms = [balanced(q, k, rank) for q, k in zip(q_moments, k_moments)]
    queries, keys = (torch.stack(part).float() for part in zip(*forms))
    return Basis(queries, keys)


def held(q_moments: torch.Tensor, k_moments: torch.Tensor) -> torch.Tensor:
    """float64 [Hkv, D]: the share of the mean square of q . k, over independent pairs, that the best form of each rank
    has, from rank 1 on; for the query heads of each KV head together. Arguments as for `basis_of`."""
    q_moments = q_moments.unflatten(0, (len(k_moments), -1)).sum(dim=1)
    squares = [torch.linalg.svdvals(_root(q) @ _root(k)) ** 2 for q, k in zip(q_moments.double(), k_moments.double())]
    sums = torch.stack(squares).cumsum(dim=1)
    return sums / sums[:, -1:].clamp_min(torch.finfo(sums.dtype).tiny)


def balanced(q_moment: torch.Tensor, k_moment: torch.Tensor, rank: int) -> HeadBasis:
    """float64 A and B [rank, D] of the method above; rows of 0 where the product of the moments has no such rank.

    Args:
        q_moment, k_moment: float64 [D, D], symmetric and positive semidefinite.
    """
    q_root, k_root = _root(q_moment.double()), _root(k_moment.double())
    u, s, v = torch.linalg.svd(q_root @ k_root)
    kept = s[:rank] > s[0] * len(s) * torch.finfo(s.dtype).eps
    scale = s[:rank].rsqrt().where(kept, 0)[:, None]
    return scale * (v[:rank] @ k_root), scale * (u.T[:rank] @ q_root)


def _root(moment: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

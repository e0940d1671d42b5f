"""Low-rank forms of q . k: the best of their rank, and found where they are planted."""

import pytest
import torch

from sglang_mminfer.patterns.basis import Basis, balanced, basis_of, held, second_moments

RANDOM = torch.Generator().manual_seed(11)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


def moments(dim: int, directions: int) -> torch.Tensor:
    """A second moment that has so many directions, of very different sizes."""
    x = draw(3 * dim, directions) * torch.logspace(0, -3, directions, dtype=torch.float64) @ draw(directions, dim)
    return x.T @ x / len(x)


def mean_squared_error(form: torch.Tensor, q_moment: torch.Tensor, k_moment: torch.Tensor) -> float:
    """The error of q' form k for q . k, over independent q and k."""
    off = torch.eye(len(form), dtype=torch.float64) - form
    return float((q_moment @ off @ k_moment @ off.T).trace())


@pytest.mark.parametrize("directions", [16, 11])
@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_no_other_form_of_the_rank_is_better(directions: int, rank: int) -> None:
    q_moment, k_moment = moments(16, directions), moments(16, directions)
    a, b = balanced(q_moment, k_moment, rank)
    best = mean_squared_error(a.T @ b, q_moment, k_moment)
    # What the Eckart-Young theorem leaves: the squares of the singular values of Cq^1/2 Ck^1/2 behind the first ones.
    values = torch.linalg.eigvals(q_moment @ k_moment).real.clamp_min(0).sort(descending=True).values
    assert best == pytest.approx(float(values[rank:].sum()), rel=1e-6, abs=1e-9 * float(values.sum()))
    for size in (1e-3, 1e-1):
        a_near, b_near = a + size * draw(*a.shape) * a.abs().mean(), b + size * draw(*b.shape) * b.abs().mean()
        assert mean_squared_error(a_near.T @ b_near, q_moment, k_moment) >= best * (1 - 1e-9)


def test_the_first_rows_of_a_higher_rank_are_the_form_of_a_lower_one() -> None:
    q_moment, k_moment = moments(16, 16), moments(16, 16)
    many, few = balanced(q_moment, k_moment, 12), balanced(q_moment, k_moment, 5)
    for own, expected in zip(many, few):
        torch.testing.assert_close(own[:5], expected)


def test_the_full_rank_is_q_times_k() -> None:
    a, b = balanced(moments(12, 12), moments(12, 12), 12)
    torch.testing.assert_close(a.T @ b, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)


def test_planted_directions_are_found() -> None:
    """Queries and keys of any length that share three directions: rank 3 gives q . k to rounding, rank 2 does not."""
    shared, dim = torch.linalg.qr(draw(32, 3)).Q.T, 32
    apart = torch.linalg.qr(torch.cat([shared.T, draw(dim, dim - 3)], dim=1)).Q.T[3:]
    q = draw(500, 3) * 3 @ shared + draw(500, 14) @ apart[:14]
    k = draw(500, 3) * 3 @ shared + draw(500, 15) @ apart[14:]
    errors = []
    for rank in (2, 3):
        basis = basis_of(second_moments(q[:, None]), second_moments(k[:, None]), rank)
        a, b = (part.double() for part in basis.of_head(0, 1))
        errors.append(float(((q @ a.T) @ (k @ b.T).T - q @ k.T).abs().max()))
    assert errors[1] < 1e-4 < 1 < errors[0]


def test_heads_of_one_kv_head_share_the_form_that_is_best_for_all_of_them() -> None:
    q, k = (
        draw(400, 4, 16) * torch.rand(4, 16, generator=RANDOM),
        draw(400, 2, 16) * torch.rand(2, 16, generator=RANDOM),
    )
    q_moments, k_moments = second_moments(q), second_moments(k)
    shared, own = (basis_of(q_moments, k_moments, 3, shared=shared) for shared in (True, False))
    assert shared.keys.shape == (2, 3, 16) and own.keys.shape == (4, 3, 16)
    assert [shared.number(head, 4) for head in range(4)] == [0, 0, 1, 1]

    def errors(basis: Basis) -> list[float]:
        forms = [a.double().T @ b.double() for a, b in (basis.of_head(head, 4) for head in range(4))]
        return [mean_squared_error(form, q_moments[h], k_moments[h // 2]) for h, form in enumerate(forms)]

    assert all(apart <= together for apart, together in zip(errors(own), errors(shared)))
    for kv_head in range(2):  # with keys projected as they are, no A of a head's own is better than the common one
        a, b = shared.queries[kv_head].double(), shared.keys[kv_head].double()
        for head in (2 * kv_head, 2 * kv_head + 1):
            best = mean_squared_error(a.T @ b, q_moments[head], k_moments[kv_head])
            for _ in range(5):
                other = a + 0.05 * draw(*a.shape) * a.abs().mean()
                assert mean_squared_error(other.T @ b, q_moments[head], k_moments[kv_head]) >= best * (1 - 1e-6)


def test_shapes_and_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \[heads, rank, D\], got \[2, 3, 8\] and \[2, 4, 8\]"):
        Basis(torch.zeros(2, 3, 8), torch.zeros(2, 4, 8))
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"rank: expected 1 to 8 .*, got {rank}"):
            basis_of(torch.zeros(2, 8, 8), torch.zeros(1, 8, 8), rank)


def test_what_a_rank_holds_is_the_mean_square_of_its_form() -> None:
    """Over all pairs of the queries and keys of a KV head, those of its query heads together."""
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randn(40, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2))
    q, k = q * torch.arange(1, 9), k * torch.arange(9, 1, -1)
    moments = second_moments(q), second_moments(k)
    shares = held(*moments)
    assert shares.shape == (2, 8) and torch.all(shares.diff(dim=1) >= 0)
    for rank in (1, 3, 8):
        basis = basis_of(*moments, rank)
        for kv_head in range(2):
            own = q[:, 2 * kv_head : 2 * kv_head + 2].flatten(0, 1)
            exact = own @ k[:, kv_head].T
            form = (own @ basis.queries[kv_head].double().T) @ (k[:, kv_head] @ basis.keys[kv_head].double().T).T
            lost = ((exact - form) ** 2).mean() / (exact**2).mean()
            torch.testing.assert_close(1 - lost, shares[kv_head, rank - 1], atol=1e-5, rtol=0)

"""Planted heads look at what is planted, and the figures of selectors are what a mask written out gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_mminfer import AShape, PooledBlocks
from sglang_mminfer.benchmarks import selectors, selectors_report
from sglang_mminfer.benchmarks.planted_heads import COLS, KINDS, ROWS, TEXT, Draw, conversation, draw
from sglang_mminfer.benchmarks.selectors import Head, at_density, with_means
from sglang_mminfer.planning.visited import visited_rows

TOKENS, FRAME = conversation(900).length, ROWS * COLS


def attention(own: Draw) -> torch.Tensor:
    """float64 [tokens, tokens]"""
    scores = own.q[:, 0].double() @ own.k[:, 0].double().T * own.sm_scale
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(dim=1)


def draws(kind: str) -> tuple[Draw, torch.Tensor]:
    own = draw(kind, TOKENS, 32, 3, 1)
    return own, attention(own)


def test_the_conversation_is_text_a_video_and_text() -> None:
    chat = conversation(8192)
    assert [(s.start, s.stop) for s in chat.segments] == [(0, 64), (64, 8128), (8128, 8192)]
    assert TOKENS == 2 * TEXT + 4 * FRAME


def test_what_is_planted_carries_most_of_the_mass() -> None:
    position, video = torch.arange(TOKENS), slice(TEXT + 3 * FRAME + 64, TEXT + 4 * FRAME)
    lag = position[:, None] - position
    _, weights = draws("grid line")
    assert weights.masked_fill(lag % FRAME != 0, 0).sum(1)[video].mean() > 0.7
    _, weights = draws("diagonals")
    assert weights.masked_fill(lag != 3 * FRAME, 0).sum(1)[video].mean() > 0.5
    _, weights = draws("columns")
    assert weights[video].mean(0).topk(16).values.sum() > 0.9
    _, weights = draws("single far keys")
    largest = weights[:, 4:].amax(1)
    looking = (largest > 0.5).float()[TEXT:-TEXT].mean()
    assert looking == pytest.approx(TOKENS // 8 / (TOKENS - 2 * TEXT), rel=0.1), "one row of eight looks at one key"
    assert (weights[:, :4].sum(1) > 0.5)[TEXT:-TEXT].float().mean() > 0.7, "the others at the sink"
    for kind in ("diffuse", "full rank, random"):
        _, weights = draws(kind)
        assert (weights[video].amax(1).mean() < 0.1) == (kind == "diffuse")


@pytest.mark.parametrize("kind", KINDS)
def test_two_draws_of_a_head_share_its_directions_and_nothing_else(kind: str) -> None:
    first, again, other, stranger = (draw(kind, TOKENS, 32, *seeds) for seeds in ((3, 1), (3, 1), (3, 2), (4, 1)))
    assert torch.equal(first.q, again.q) and torch.equal(first.v, again.v)
    assert not torch.equal(first.q, other.q) and not torch.equal(first.k, other.k)
    if KINDS[kind].planted:
        main = torch.linalg.svd(first.q[:, 0], full_matrices=False)[2][:8]
        shares = [float((x.q[:, 0] @ main.T).square().sum() / x.q.square().sum()) for x in (first, other, stranger)]
        assert shares[1] == pytest.approx(shares[0], rel=0.05) and shares[2] < 0.5 * shares[0]


@pytest.fixture(scope="module")
def head() -> Head:
    return Head.of("columns", TOKENS, 32, 0)


def test_figures_are_those_of_a_mask_written_out(head: Head) -> None:
    pattern = AShape(64, 100)
    point, (plan, _) = head.measure(pattern), head.plan(pattern)
    mask, weights = visited_rows(plan, 0, torch.arange(TOKENS), TOKENS), attention(head.draw)
    kept, v = weights * mask, head.draw.v[:, 0].double()
    dense, out = weights @ v, kept / kept.sum(1, keepdim=True) @ v
    assert point["density"] == pytest.approx(float(mask.sum()) / (TOKENS * (TOKENS + 1) / 2))
    assert point["recall"] == pytest.approx(float(kept.sum(1).mean()), rel=1e-4)
    assert point["error"] == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-3)
    assert point["error"] > 0.1 and point["recall"] < 0.9


def test_mean_correction_is_exact_where_keys_and_values_of_a_block_are_alike(head: Head) -> None:
    own, pattern = head.draw, PooledBlocks(64, 64, 1.0)
    alike = Draw(own.q, *(x[: TOKENS // 64 * 64 : 64].repeat_interleave(64, 0)[:TOKENS] for x in (own.k, own.v)))
    blurred = Head(conversation(900), alike)
    without, corrected = blurred.measure(pattern), blurred.measure(pattern, corrected=True)
    assert without["error"] > 0.05 and corrected["error"] < 1e-5
    assert without["density"] < corrected["density"] < without["density"] + 1 / 64


def test_mean_correction_of_nothing_changes_nothing(head: Head) -> None:
    out, pairs = with_means(head.draw, head.out, head.lse, torch.ones(TOKENS, TOKENS, dtype=torch.bool), 64)
    assert torch.equal(out, head.out) and pairs == 0


def test_an_error_at_a_density_lies_on_the_line_between_two_points() -> None:
    points = [{"density": x, "error": y} for x, y in ((0.4, 0.1), (0.1, 0.5), (0.2, 0.3))]
    assert at_density(points, 0.05) is None
    assert at_density(points, 0.1) == 0.5
    assert at_density(points, 0.15) == pytest.approx(0.4)
    assert at_density(points, 0.3) == pytest.approx(0.2)
    assert at_density(points, 0.9) == 0.1
    worse_when_denser = [*points, {"density": 0.5, "error": 0.2}]
    assert at_density(worse_when_denser, 0.5) == 0.1


def test_a_result_file_and_its_pictures(tmp_path: Path) -> None:
    out = tmp_path / "some.json"
    selectors.main(["--tokens", "900", "--head-dim", "32", "--kind", "columns", "--out", str(out)])
    report = json.loads(out.read_text())
    curves = report["curves"]["columns"]
    assert list(curves) == list(selectors_report.STYLES) == list(report["at_density"]["columns"])
    for points in curves.values():
        assert all(0 < p["density"] <= 1 and 0 < p["recall"] <= 1.001 and p["error"] >= 0 for p in points.values())
    head, _, *rows = selectors_report.table(out).splitlines()
    assert head == "| | columns | choosing |" and [row.split(" | ")[0][2:] for row in rows] == list(curves)
    pictures = selectors_report.draw(out)
    assert [picture.name for picture in pictures] == ["some_error.png", "some_lost_mass.png"]
    assert all(picture.stat().st_size > 20_000 for picture in pictures)

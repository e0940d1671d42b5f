"""What `mminfer basis` does around its server: moments of all ranks become one basis, and bad input is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_mminfer import cli
from sglang_mminfer.head_config import ModelFingerprint
from sglang_mminfer.patterns.basis import basis_of, second_moments
from sglang_mminfer.serving.observe import LayerView, RankInfo, RequestView
from sglang_mminfer.serving.shares import sampled, shares
from sglang_mminfer.tools.basis import observer
from sglang_mminfer.tools.basis.command import table
from support import conversation

LAYERS, HEADS, KV_HEADS, D, TOKENS = 3, 8, 2, 16, 90
NO_MEDIA = None


def heads(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of all layers: [layers, tokens, heads, D]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, TOKENS, HEADS, D, generator=draw), torch.randn(
        LAYERS, TOKENS, KV_HEADS, D, generator=draw
    )


def view(layer: int, first: int, q: torch.Tensor, k: torch.Tensor, start: int, stop: int, rid: str) -> LayerView:
    """Rows [start, stop) of a request among those of another one."""
    own = RequestView(rid, start, stop - start, 2, TOKENS, NO_MEDIA, "dense_config", torch.arange(stop))
    rows = torch.cat([torch.full((2, *q.shape[1:]), 9.0), q[start:stop]])
    return LayerView(layer, first, rows, k, k, 0.25, (own,), (), (), rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_chunks_come_together(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = heads()
    count, kv_count = HEADS // ranks, max(KV_HEADS // ranks, 1)
    for rank in range(ranks):
        monkeypatch.setattr("os.getpid", lambda rank=rank: 1000 + rank)
        found = observer.observer(str(tmp_path), RankInfo(rank, ranks, LAYERS, None))
        first, first_kv = rank * count, rank * KV_HEADS // ranks
        own_q, own_k = q[:, :, first : first + count], k[:, :, first_kv : first_kv + kv_count]
        for start, stop in ((0, 40), (40, TOKENS)):
            for layer in range(LAYERS - 1):  # the last one is not shown
                found.layer(view(layer, first, own_q[layer], own_k[layer], start, stop, f"{observer.RID}-0"))
                found.layer(view(layer, first, 9 * own_q[layer], own_k[layer], start, stop, "a user's"))
            found.batch_done([])
    of_q, of_k, shares, rows = observer.read(tmp_path, LAYERS, HEADS, KV_HEADS)
    assert shares[:-1].isnan().all(), "without media nobody chooses"
    assert rows == TOKENS and not of_q[-1].any() and not of_k[-1].any()
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(of_q[layer], second_moments(q[layer]))
        torch.testing.assert_close(of_k[layer], second_moments(k[layer]))


def test_shares_are_the_mean_over_the_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request's by the basis of the requests so far; one that is too short says nothing."""
    monkeypatch.setattr("sglang_mminfer.serving.shares.LEAST", 64)
    chat, rule = conversation(20, (9, 10, 10), 30), observer.default_rule()
    draw = torch.Generator().manual_seed(5)
    q, k = (
        torch.randn(2, chat.length, HEADS, D, generator=draw),
        torch.randn(2, chat.length, KV_HEADS, D, generator=draw),
    )
    found, expected = observer.observer(str(tmp_path), RankInfo(0, 1, 1, None)), []
    moments = [torch.zeros(HEADS, D, D), torch.zeros(KV_HEADS, D, D)]
    for number in (0, 1):
        for start, stop in ((0, 700), (700, chat.length)):
            rid = f"{observer.RID}-{number}"
            own = RequestView(rid, start, stop - start, 0, chat.length, chat, "dense_config", torch.arange(stop))
            view = LayerView(0, 0, q[number, start:stop], k[number], k[number], 0.25, (own,), (), (), q[number])
            found.layer(view)
            found.batch_done([])
        moments = [so_far + second_moments(x[number]) for so_far, x in zip(moments, (q, k))]
        tiles = [(a, q[number, a:b]) for a, b in sampled(rule, chat, chat.length)]
        basis = basis_of(*moments, rule.rank)
        expected.append(shares(rule, tiles, chat, k[number], torch.arange(chat.length), 0.25, basis))
        *_, found_shares, _ = observer.read(tmp_path, 1, HEADS, KV_HEADS)
        torch.testing.assert_close(found_shares[0], torch.stack(expected).mean(dim=0), atol=2e-3, rtol=0)
    short = RequestView(f"{observer.RID}-2", 0, 200, 0, 200, chat, "dense_config", torch.arange(200))
    found.layer(LayerView(0, 0, q[0, :200], k[0], k[0], 0.25, (short,), (), (), q[0]))
    found.batch_done([])
    *_, after, rows = observer.read(tmp_path, 1, HEADS, KV_HEADS)
    assert torch.equal(after, found_shares) and rows == 2 * chat.length + 200 and expected[0].amax() > 0


def test_nothing_is_written_for_others(tmp_path: Path) -> None:
    q, k = heads()
    found = observer.observer(str(tmp_path), RankInfo(0, 1, LAYERS, None))
    found.layer(view(0, 0, q[0], k[0], 0, TOKENS, "a user's"))
    found.batch_done([])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        observer.read(tmp_path, LAYERS, HEADS, KV_HEADS)


def test_the_table_has_the_share_that_ranks_hold() -> None:
    q, k = heads()
    q[0, ..., 4:] = 0  # layer 0 fills four dimensions
    moments = [torch.stack([second_moments(layer) for layer in x]) for x in (q, k)]
    moments[0][2] = moments[1][2] = 0  # as where no process showed the layer
    model = ModelFingerprint("x", LAYERS, HEADS, KV_HEADS, D, HEADS * D, 1e4)
    head, first, second, third, of_all = table(*moments, model).splitlines()
    assert [words.split()[0] for words in head.split("rank")[1:]] == ["2", "4", "8", "16"]
    assert first.split()[3:] == ["100.0%"] * 6
    assert float(second.split()[3].rstrip("%")) < 60 and second.split()[-1] == "100.0%"
    assert "not shown" in third and of_all.split()[0] == "all"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "basis.npz"], "--out: expected a name that ends in .basis.npz, got basis.npz"),
        (["--conversation", "nothing.json"], "nothing.json: no such file"),
        ([], "--model-path: ./nowhere: no such folder"),
    ],
)
def test_bad_input_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["basis", "--model-path", "./nowhere", *arguments]) == 2
    assert words in capsys.readouterr().err

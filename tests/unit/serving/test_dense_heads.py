"""Dense heads beside sparse ones run on a stock backend, which gets no other heads."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_mminfer import AShape, Dense
from sglang_mminfer.serving.dense_heads import dense_heads

CPU = torch.device("cpu")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, D]: the causal attention that a dense backend computes."""
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@given(st.integers(1, 4).flatmap(lambda kv: st.tuples(st.just(kv), st.integers(1, 5))), st.data())
def test_the_stock_backend_gets_a_regular_layer_and_each_head_its_own_result(shape, data):
    kv_heads, group = shape
    is_dense = data.draw(st.lists(st.booleans(), min_size=kv_heads * group, max_size=kv_heads * group))
    own = dense_heads([Dense() if d else AShape(1, 1) for d in is_dense], kv_heads, CPU, most_repeated=100)
    if not any(is_dense):
        assert own is None
        return
    random = torch.Generator().manual_seed(0)
    q = torch.randn(9, kv_heads * group, 8, generator=random)
    k, v = (torch.randn(9, kv_heads, 8, generator=random) for _ in range(2))
    layer = SimpleNamespace(tp_q_head_num=kv_heads * group)

    def stock(some: torch.Tensor, view) -> torch.Tensor:
        assert view is not layer and some.shape == (9, view.tp_q_head_num * 8) and some.is_contiguous()
        assert view.tp_q_head_num % kv_heads == 0
        return attention(some.view(9, -1, 8), k, v).flatten(1)

    out = torch.full_like(q, torch.nan)
    own.run(stock, q, layer, out)
    dense = [head for head, d in enumerate(is_dense) if d]
    assert own.heads == tuple(dense) and layer.tp_q_head_num == kv_heads * group
    torch.testing.assert_close(out[:, dense], attention(q, k, v)[:, dense])
    assert bool(out[:, [head for head, d in enumerate(is_dense) if not d]].isnan().all()), "a sparse head was written"


@pytest.mark.parametrize(
    ("dense", "taken"),
    [((0, 4), 2), ((0, 1, 4, 5), 4), ((0, 1, 4), 4), ((0, 1, 2, 4, 5), 6), ((1,), None)],
)
def test_heads_are_run_again_only_where_that_is_cheap(dense, taken):
    own = dense_heads([Dense() if head in dense else AShape(1, 1) for head in range(8)], 2, CPU)
    assert (len(own.taken) if own else None) == taken

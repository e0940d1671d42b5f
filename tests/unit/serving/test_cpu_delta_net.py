"""The operators of gated delta nets on a CPU, against transformers' own and against each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from sglang_mminfer.serving import cpu_delta_net as net

KEY_HEADS, HEADS, KEY_DIM, DIM, SLOTS = 2, 6, 16, 24, 5
CLOSE = {"atol": 2e-5, "rtol": 2e-4}


class Drawn(NamedTuple):
    """Inputs of one sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def part(self, start: int, stop: int | None) -> Drawn:
        return Drawn(*(x[:, start:stop] for x in self))


def drawn(tokens: int, seed: int = 0, decay: float = 0.1) -> Drawn:
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, tokens, KEY_HEADS, KEY_DIM, generator=draw)
    v = torch.randn(1, tokens, HEADS, DIM, generator=draw)
    g, beta = torch.rand(2, 1, tokens, HEADS, generator=draw)
    return Drawn(q, k, v, -decay * g, beta)


def states(seed: int = 7) -> torch.Tensor:
    return torch.randn(SLOTS, HEADS, DIM, KEY_DIM, generator=torch.Generator().manual_seed(seed))


def prefill(inputs: Drawn, state: torch.Tensor, slots: list[int], bounds: list[int], **more: Any) -> Any:
    return net.prefill(
        lambda *args: pytest.fail("this is Triton's"),
        *inputs,
        initial_state=state,
        initial_state_indices=torch.tensor(slots),
        cu_seqlens=torch.tensor(bounds),
        use_qk_l2norm_in_kernel=True,
        **more,
    )


def recurrent(inputs: Drawn, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and last state by transformers, whose states are [key, value]."""
    group = HEADS // KEY_HEADS
    q, k = (x.repeat_interleave(group, dim=2) for x in (inputs.q, inputs.k))
    out, last = theirs.torch_recurrent_gated_delta_rule(
        q,
        k,
        inputs.v,
        g=inputs.g,
        beta=inputs.beta,
        initial_state=state.mT[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out, last[0].mT


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", [0.0, 0.1, 30.0])
def test_a_prompt_is_as_token_by_token(tokens: int, decay: float) -> None:
    inputs, pool = drawn(tokens, decay=decay), states()
    expected, last = recurrent(inputs, pool[3])
    before = pool.clone()
    out, nothing, _ = prefill(inputs, pool, [3], [0, tokens])
    assert nothing is None
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(pool[3], last, **CLOSE)
    others = [0, 1, 2, 4]
    assert torch.equal(pool[others], before[others])


def test_a_cut_changes_nothing() -> None:
    inputs, whole, cut = drawn(150), states(), states()
    expected, _, _ = prefill(inputs, whole, [1], [0, 150])
    parts = [prefill(inputs.part(a, b), cut, [1], [0, b - a])[0] for a, b in ((0, 70), (70, 71), (71, 150))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    torch.testing.assert_close(cut, whole, **CLOSE)


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    first, second, pool = drawn(70, 1), drawn(30, 2), states()
    alone = states()
    expected = [prefill(first, alone, [4], [0, 70])[0], prefill(second, alone, [0], [0, 30])[0]]
    both = Drawn(*(torch.cat(pair, dim=1) for pair in zip(first, second)))
    out, _, kept = prefill(both, pool, [4, 0], [0, 70, 100])
    torch.testing.assert_close(out, torch.cat(expected, dim=1), **CLOSE)
    torch.testing.assert_close(pool, alone, **CLOSE)
    # 2 chunks of the first sequence and 1 of the second, each with the state before it.
    after_64 = states()
    prefill(first.part(0, 64), after_64, [4], [0, 64])
    torch.testing.assert_close(kept[0], torch.stack([states()[4], after_64[4], states()[0]]), **CLOSE)


def test_padding_and_states_that_are_to_stay() -> None:
    inputs, pool = drawn(10), states()
    out, _, _ = prefill(inputs, pool, [-1], [0, 10])
    assert not out.any() and torch.equal(pool, states())
    out, _, _ = prefill(inputs, pool, [2], [0, 10], inplace_update=False)
    assert out.any() and torch.equal(pool, states())


def test_a_token_is_a_prompt_of_one() -> None:
    draw = torch.Generator().manual_seed(3)
    channels = 2 * KEY_HEADS * KEY_DIM + HEADS * DIM
    qkv, (a, b) = torch.randn(3, channels, generator=draw), torch.randn(2, 3, HEADS, generator=draw)
    a_log, dt_bias = torch.randn(2, HEADS, generator=draw)
    slots, pool, expected_pool = [2, -1, 0], states(), states()
    out = torch.full((3, 1, HEADS, DIM), torch.nan)
    returned, same_pool = net.decode(
        lambda: None, qkv, a, b, a_log, dt_bias, KEY_DIM**-0.5, pool, out, torch.tensor(slots), True
    )
    assert returned is out and same_pool is pool
    g, beta = net.gates(lambda: None, a_log, a, b, dt_bias)
    parts = qkv.split([KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, HEADS * DIM], dim=1)
    q, k, v = (part.unflatten(1, (heads, -1)) for part, heads in zip(parts, (KEY_HEADS, KEY_HEADS, HEADS)))
    inputs = Drawn(q[None], k[None], v[None], g, beta)
    expected, _, _ = prefill(inputs, expected_pool, slots, [0, 1, 2, 3])
    torch.testing.assert_close(out[:, 0], expected[0], **CLOSE)
    torch.testing.assert_close(pool, expected_pool, **CLOSE)


def test_gates_are_those_of_the_model() -> None:
    draw = torch.Generator().manual_seed(4)
    a, b = 8 * torch.randn(2, 5, HEADS, generator=draw)
    a_log, dt_bias = torch.randn(2, HEADS, generator=draw)
    g, beta = net.gates(lambda: None, a_log, a, b, dt_bias)
    torch.testing.assert_close(g[0], -a_log.exp() * torch.nn.functional.softplus(a + dt_bias))
    torch.testing.assert_close(beta[0], b.sigmoid())


@pytest.mark.parametrize("lengths", [[5], [1, 2, 7], [3, 0, 4]])
def test_a_convolution_sees_what_came_before(lengths: list[int]) -> None:
    draw = torch.Generator().manual_seed(5)
    channels, width, total = 6, 4, sum(lengths)
    x, weight = torch.randn(channels, total, generator=draw), torch.randn(channels, width, generator=draw)
    pool = torch.randn(SLOTS, channels, width - 1, generator=draw)
    before, slots, goes_on = pool.clone(), [3, 0, 4][: len(lengths)], [True, False, True][: len(lengths)]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    out = net.convolve(
        lambda: None,
        x,
        weight,
        None,
        pool,
        torch.tensor(bounds),
        lengths,
        cache_indices=torch.tensor(slots),
        has_initial_state=torch.tensor(goes_on),
    )
    for start, stop, slot, continues in zip(bounds, bounds[1:], slots, goes_on):
        history = before[slot] if continues else torch.zeros(channels, width - 1)
        inputs = torch.cat([history, x[:, start:stop]], dim=1)
        for token in range(stop - start):
            expected = torch.nn.functional.silu((inputs[:, token : token + width] * weight).sum(1))
            torch.testing.assert_close(out[:, start + token], expected)
        if stop > start:
            assert torch.equal(pool[slot], inputs[:, -(width - 1) :])
    untouched = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(pool[untouched], before[untouched])


def test_a_convolved_token_is_a_sequence_of_one() -> None:
    draw = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((3, 6), (6, 4), (6,)))
    pool = torch.randn(SLOTS, 6, 3, generator=draw)
    other, slots = pool.clone(), torch.tensor([1, -1, 2])
    out = net.convolve_token(lambda: None, x, pool, weight, bias, "silu", conv_state_indices=slots)
    expected = net.convolve(
        lambda: None, x.T, weight, bias, other, torch.arange(4), None, slots, torch.ones(3, dtype=torch.bool)
    )
    torch.testing.assert_close(out, expected.T)
    assert torch.equal(pool, other) and not out[1].any()


def test_several_tokens_of_a_sequence_are_refused_in_words() -> None:
    with pytest.raises(NotImplementedError, match="one token at a time"):
        net.convolve_token(
            lambda: None,
            torch.zeros(1, 6, 2),
            torch.zeros(1, 6, 3),
            torch.zeros(6, 4),
            None,
            "silu",
            None,
            torch.tensor([0]),
        )


def test_the_norm_is_that_of_the_model() -> None:
    draw = torch.Generator().manual_seed(8)
    x, z = torch.randn(2, 7, DIM, generator=draw)
    norm = theirs.Qwen3_5RMSNormGated(DIM, eps=1e-6)
    norm.weight.data = torch.randn(DIM, generator=draw)
    out = net.gated_norm(lambda: None, x, norm.weight.data, None, z=z, eps=1e-6, is_rms_norm=True)
    torch.testing.assert_close(out, norm(x, z).detach())
    with pytest.raises(NotImplementedError, match="RMS norm"):
        net.gated_norm(lambda: None, x, norm.weight.data, None, z=z)


def test_gates_of_attention_and_of_an_expert() -> None:
    draw = torch.Generator().manual_seed(9)
    out, gate = torch.randn(4, 12, generator=draw), torch.randn(4, 3, 8, generator=draw)[..., 4:]
    expected = out * gate.reshape(4, 12).sigmoid()
    torch.testing.assert_close(net.gate_output(lambda: None, out.clone(), gate), expected)
    assert net.gate_output(lambda: None, out, gate, inplace=True) is out
    torch.testing.assert_close(out, expected)
    hidden, weight, shared, total = (torch.randn(*shape, generator=draw) for shape in ((4, 6), (6,), (4, 6), (4, 6)))
    expected = total + (hidden @ weight).sigmoid()[:, None] * shared
    net.add_gated(lambda: None, hidden, weight, shared, total)
    torch.testing.assert_close(total, expected)


def test_projections_are_split_in_order() -> None:
    qkvz = torch.arange(2 * 40.0).reshape(2, 40)  # of each token: q 4, k 4, v 16, z 16
    ba = torch.arange(2 * 8.0).reshape(2, 8)
    qkv, z, b, a = net.split_projections(lambda: None, qkvz, ba, 2, 4, 2, 4)
    assert torch.equal(qkv, qkvz[:, :24]) and torch.equal(z, qkvz[:, 24:].reshape(2, 4, 4))
    assert torch.equal(b, ba[:, :4]) and torch.equal(a, ba[:, 4:])


def test_tensors_of_another_device_are_sglangs_matter() -> None:
    a, a_log = torch.empty(3, HEADS, device="meta"), torch.empty(HEADS, device="meta")
    assert net.gates(lambda *args, **kwargs: (args, kwargs), a_log, a, b=a, dt_bias=a_log) == (
        (a_log, a),
        {"b": a, "dt_bias": a_log},
    )

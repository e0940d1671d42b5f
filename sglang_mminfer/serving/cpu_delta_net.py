"""The operators of gated delta nets, and of full layers with a gated output, in plain torch.

SGLang has them as Triton kernels, which need an accelerator, and in a kernel package for its own CPU engine. Only the
CPU platform of this package installs these, and they leave tensors of another device to SGLang. Shapes, names and
values are those of SGLang's functions; sums are in fp32.

A gated delta net (arXiv 2412.06464) has a state S [value, key] for each value head, which starts with 0. A token with
query q and key k (of length 1; q times `scale`), value v, decay g <= 0 and weight beta changes and reads it:

    S = exp(g) S;  S = S + beta (v - S k) k^T;  output = S q
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

CHUNK = 64
"""Tokens whose changes of the state are computed together, and after which SGLang's kernel keeps a copy of it."""

NORM_EPSILON = 1e-6

T = TypeVar("T")


def on_cpu(function: Callable[..., T]) -> Callable[..., T]:
    """An AROUND hook that calls `function` for tensors of the CPU, and SGLang's own for those of another device."""

    @functools.wraps(function)
    def hook(original: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return (function if first.device.type == "cpu" else original)(*args, **kwargs)

    return hook


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of the last dimension, made as long as 1."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _gates(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AROUND fused_gdn_gating, as `gates`: decay and weight of each token and value head, fp32 [1, tokens, heads].

    Args:
        A_log, dt_bias: [heads].
        a, b: [tokens, heads].
    """
    decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float(), beta, threshold)
    return decay[None], b.float().sigmoid()[None]


gates = on_cpu(_gates)


@on_cpu
def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: Any = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    **unused: Any,
) -> torch.Tensor:
    """AROUND causal_conv1d_fn: a causal convolution of each channel over each sequence, [channels, tokens].

    A sequence continues behind the last inputs of its slot, and leaves its own there.

    Args:
        x: [channels, tokens] of all sequences.
        weight: [channels, width].
        conv_states: the last inputs of all slots, [slots, channels, width - 1]; changed in place.
        query_start_loc: where each sequence begins, [sequences + 1].
        cache_indices: the slot of each sequence; negative for padding, which gives 0.
        has_initial_state: bool [sequences]: whether a sequence continues.
    """
    out = torch.zeros_like(x)
    bounds = query_start_loc.tolist()
    slots = range(len(bounds) - 1) if cache_indices is None else cache_indices.tolist()
    continues = [False] * (len(bounds) - 1) if has_initial_state is None else has_initial_state.tolist()
    for start, stop, slot, goes_on in zip(bounds, bounds[1:], slots, continues):
        if slot < 0 or stop == start:
            continue
        before = conv_states[slot] if goes_on else torch.zeros_like(conv_states[slot])
        inputs = torch.cat([before, x[:, start:stop]], dim=1)
        out[:, start:stop] = _convolved(inputs[None], weight, bias, activation)[0]
        conv_states[slot] = inputs[:, -conv_states.shape[2] :]
    return out


@on_cpu
def convolve_token(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """AROUND causal_conv1d_update: `convolve` for one token of each sequence.

    Args:
        x: [sequences, channels].
        conv_state, weight: as in `convolve`.
        conv_state_indices: the slot of each sequence.

    Raises:
        NotImplementedError: for several tokens of a sequence, which speculative decoding has.
    """
    if x.ndim != 2 or cache_seqlens is not None or conv_state_indices is None:
        raise NotImplementedError("mminfer: on a CPU a gated delta net decodes one token at a time.")
    valid = conv_state_indices >= 0
    slots = conv_state_indices[valid].long()
    inputs = torch.cat([conv_state[slots], x[valid, :, None].to(conv_state.dtype)], dim=2)
    out = torch.zeros_like(x)
    out[valid] = _convolved(inputs, weight, bias, "silu" if activation is True else activation or None)[:, :, -1]
    conv_state[slots] = inputs[:, :, 1:]
    return out


def _convolved(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """[sequences, channels, width - 1 + tokens] to [sequences, channels, tokens]."""
    out = F.conv1d(inputs.to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(out) if activation in ("silu", "swish") else out


@on_cpu
def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """AROUND chunk_gated_delta_rule: the net over whole sequences.

    Args:
        q, k: [1, tokens, key heads, dimensions].
        v: [1, tokens, value heads, dimensions]; value heads in groups share a key head.
        g, beta: [1, tokens, value heads].
        initial_state: the states of all slots, [slots, value heads, dimensions of v, of k].
        initial_state_indices: the slot of each sequence; negative for padding, which gives 0.
        cu_seqlens: where each sequence begins, [sequences + 1].
        inplace_update: whether the slots take the states after the sequences.

    Returns:
        (outputs as `v`, None, the state before every chunk of every sequence: [1, chunks, as a slot]).
    """
    assert initial_state is not None and initial_state_indices is not None and cu_seqlens is not None
    group = v.shape[2] // k.shape[2]
    q, k = (_unit(x) if use_qk_l2norm_in_kernel else x.float() for x in (q, k))
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    # [heads, tokens, dimensions]
    q, k = (x[0].repeat_interleave(group, dim=1).transpose(0, 1) for x in (q, k))
    values, decay, weight = v[0].float().transpose(0, 1), g[0].float().T, beta[0].float().T
    out = torch.zeros_like(values)
    states = []
    bounds = cu_seqlens.tolist()
    for start, stop, slot in zip(bounds, bounds[1:], initial_state_indices.tolist()):
        state = initial_state[max(slot, 0)].float().clone()  # not a view of what changes below
        for first in range(start, stop, CHUNK):
            here = slice(first, min(first + CHUNK, stop))
            states.append(state)
            if slot >= 0:
                out[:, here], state = _chunk(
                    q[:, here], k[:, here], values[:, here], decay[:, here], weight[:, here], state
                )
        if inplace_update and slot >= 0:
            initial_state[slot] = state.to(initial_state.dtype)
    kept = torch.stack(states) if states else initial_state.new_empty(0, *initial_state.shape[1:])
    return out.transpose(0, 1)[None].to(v.dtype), None, kept[None].to(v.dtype)


def _chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a chunk of tokens, and the state behind it, without a step for each token.

    Token i adds u_i k_i^T to the state. With d(i, j) = exp(g of the tokens behind j, up to i), u solves the triangular
    system

        u_i + beta_i sum over j < i of d(i, j) (k_i . k_j) u_j = beta_i (v_i - d(i, -1) state k_i)

    Args:
        q, k, v: [heads, tokens, dimensions].
        g, beta: [heads, tokens].
        state: [heads, dimensions of v, of k] before the chunk.
    """
    sums = g.cumsum(1)
    later = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool).triu(1)
    decay = (sums[:, :, None] - sums[:, None, :]).masked_fill(later, -torch.inf).exp()
    since_start = sums.exp()[:, :, None]
    couplings = beta[:, :, None] * decay * (k @ k.mT)
    expected = since_start * (k @ state.mT)
    # The solver takes the diagonal for 1 and reads nothing above it.
    u = torch.linalg.solve_triangular(couplings, beta[:, :, None] * (v - expected), upper=False, unitriangular=True)
    out = since_start * (q @ state.mT) + (decay * (q @ k.mT)) @ u
    to_end = (sums[:, -1:] - sums).exp()[:, :, None]
    return out, sums[:, -1].exp()[:, None, None] * state + (to_end * u).mT @ k


@on_cpu
def decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AROUND fused_recurrent_gated_delta_rule_packed_decode: the net for one token of each sequence.

    Args:
        mixed_qkv: [sequences, q and k of all key heads, v of all value heads].
        a, b, A_log, dt_bias: as in `gates`.
        initial_state: as in `prefill`; changed in place.
        out: [sequences, 1, value heads, dimensions]; written.
        ssm_state_indices: the slot of each sequence; negative for padding, which gives 0.

    Returns:
        (out, initial_state)
    """
    heads, value_dim, key_dim = initial_state.shape[1:]
    key_heads = (mixed_qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    parts = mixed_qkv.float().split([key_heads * key_dim, key_heads * key_dim, heads * value_dim], dim=1)
    q, k = (part.unflatten(1, (key_heads, key_dim)) for part in parts[:2])
    q, k = (_unit(x) if use_qk_l2norm_in_kernel else x for x in (q, k))
    q, k = (x.repeat_interleave(heads // key_heads, dim=1) for x in (q * scale, k))  # [sequences, heads, key_dim]
    v = parts[2].unflatten(1, (heads, value_dim))
    decay, weight = (x[0] for x in _gates(A_log, a, b, dt_bias))
    valid = ssm_state_indices >= 0
    slots = ssm_state_indices[valid].long()
    state = decay[valid].exp()[:, :, None, None] * initial_state[slots].float()
    expected = (state @ k[valid, :, :, None])[..., 0]
    change = weight[valid, :, None] * (v[valid] - expected)
    state = state + change[..., None] * k[valid, :, None, :]
    out.zero_()
    out[valid, 0] = (state @ q[valid, :, :, None])[..., 0].to(out.dtype)
    initial_state[slots] = state.to(initial_state.dtype)
    return out, initial_state


@on_cpu
def split_projections(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """AROUND fused_qkvzba_split_reshape_cat_contiguous.

    Returns:
        (q, k and v [tokens, channels], z [tokens, value heads, dimensions], b, a [tokens, value heads])
    """
    values = num_heads_v * head_v
    qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + values, values], dim=-1)
    b, a = mixed_ba.split([num_heads_v, num_heads_v], dim=-1)
    return qkv.contiguous(), z.reshape(-1, num_heads_v, head_v), b.contiguous(), a.contiguous()


@on_cpu
def gated_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """AROUND layernorm_fn: the norm of `x`, times the activation of `z`. Shapes are equal.

    Raises:
        NotImplementedError: for what a gated delta net does not use.
    """
    if not (is_rms_norm and norm_before_gate) or bias is not None or group_size not in (None, x.shape[-1]):
        raise NotImplementedError("mminfer: on a CPU this norm is an RMS norm over all dimensions, before the gate.")
    out = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    if z is not None:
        out = out * (F.silu if activation in ("silu", "swish") else torch.sigmoid)(z.float().reshape(x.shape))
    return out.to(x.dtype)


@on_cpu
def gate_output(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """AROUND fused_sigmoid_mul: the attention's output times the sigmoid of its gate.

    Raises:
        NotImplementedError: for a quantized result.
    """
    if quant:
        raise NotImplementedError("mminfer: on a CPU the gated output of attention is not quantized.")
    weights = gate.reshape(attn_output.shape).sigmoid()
    return attn_output.mul_(weights) if inplace else attn_output * weights


@on_cpu
def add_gated(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """AROUND fused_gate_sigmoid_mul_add: adds the shared expert's output, times the sigmoid of its gate."""
    gate = (hidden_states @ gate_weight).sigmoid()
    final_hidden_states += gate[:, None] * shared_output

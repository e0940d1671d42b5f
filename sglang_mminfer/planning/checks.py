"""Checks of the arguments of the sparse prefill wrapper: each error names the argument, what was expected and what
came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from sglang_mminfer.kernels.executors import FP8, WIDE
from sglang_mminfer.modality.integers import plain_int
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.boundary import HeadPattern

QUERIES = (*WIDE, torch.float64)
CACHES = (*QUERIES, *FP8)


def expect(condition: bool, name: str, expected: str, got: str) -> None:
    """
    Raises:
        ValueError: unless `condition`.
    """
    if not condition:
        raise ValueError(f"SparsePrefillWithPagedKVCacheWrapper: {name}: expected {expected}, got {got}")


def integer(name: str, value: Any, least: int) -> int:
    """`value` as a plain int: an integer of NumPy or torch is one, too."""
    plain: Any = plain_int(value)
    expect(plain is not None and plain >= least, name, f"an integer >= {least}", repr(value))
    return plain


def index(name: str, value: Any, count: int) -> int:
    plain: Any = plain_int(value)
    expect(plain is not None and 0 <= plain < count, name, f"0 to {count - 1}", repr(value))
    return plain


def number(name: str, value: Any) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    expect(is_number and math.isfinite(value), name, "a number", repr(value))
    return float(value)


def integers(name: str, values: Any) -> list[int]:
    """The values of a 1-D integer tensor."""
    return int_tensor(name, values).tolist()


def int_tensor(name: str, values: Any) -> torch.Tensor:
    is_tensor = isinstance(values, torch.Tensor)
    fits = is_tensor and values.ndim == 1 and not values.is_floating_point() and values.dtype is not torch.bool
    got = f"{type(values).__name__} {getattr(values, 'dtype', '')} {list(values.shape) if is_tensor else ''}"
    expect(fits, name, "a 1-D integer tensor", got.rstrip())
    return values


def tensor(name: str, value: Any, shape: Sequence[int], dtype: torch.dtype, origin: str = "") -> None:
    """
    Args:
        origin: words between "the" and "dtype".
    """
    is_tensor = isinstance(value, torch.Tensor)
    expect(is_tensor, name, f"a tensor of the shape {tuple(shape)}", type(value).__name__)
    expect(tuple(value.shape) == tuple(shape), name, f"the shape {tuple(shape)}", str(tuple(value.shape)))
    expect(value.dtype == dtype, name, f"the {origin}dtype {dtype}", str(value.dtype))


def dtype(name: str, value: Any, known: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that `value` is or names."""
    named: Any = getattr(torch, value, None) if isinstance(value, str) else value
    expect(isinstance(named, torch.dtype), name, "a torch dtype or its name", repr(value))
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
    expect(named in known, name, f"one of {names}", repr(value))
    return named


def head_shape(num_qo_heads: Any, num_kv_heads: Any, head_dim_qk: Any, page_size: Any) -> tuple[int, int, int, int]:
    """The same four, each as a plain int."""
    page_size = integer("page_size", page_size, least=1)
    num_kv_heads = integer("num_kv_heads", num_kv_heads, least=1)
    head_dim_qk = integer("head_dim_qk", head_dim_qk, least=1)
    plain: Any = plain_int(num_qo_heads)
    fits = plain is not None and plain >= 1 and plain % num_kv_heads == 0
    expect(fits, "num_qo_heads", f"a multiple of num_kv_heads={num_kv_heads}", repr(num_qo_heads))
    return plain, num_kv_heads, head_dim_qk, page_size


def head_patterns(value: Any, num_qo_heads: int) -> list[HeadPattern]:
    """One pattern for each query head, from one for all or one for each."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    patterns = list(value) if is_list else [value]
    for i, pattern in enumerate(patterns):
        expect(isinstance(pattern, HeadPattern), f"head_patterns[{i}]", "a pattern or a boundary", repr(pattern))
    if len(patterns) == 1:
        patterns = patterns * num_qo_heads
    expected = f"{num_qo_heads} patterns (or one for all)"
    expect(len(patterns) == num_qo_heads, "head_patterns", expected, str(len(patterns)))
    return patterns


def basis(value: Any, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int) -> None:
    if value is None:
        return
    expect(isinstance(value, Basis), "basis", "a Basis or None", repr(value))
    expected = f"forms for {num_kv_heads} or {num_qo_heads} heads of {head_dim_qk} dimensions"
    fits = len(value.keys) in (num_kv_heads, num_qo_heads) and value.keys.shape[2] == head_dim_qk
    expect(fits, "basis", expected, str(list(value.keys.shape)))

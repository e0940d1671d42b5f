"""Every bad argument of the wrapper gives a ValueError that names the argument, what came and what was expected."""

import re

import numpy as np
import pytest
import torch

from sglang_mminfer import AShape, Dense, SparsePrefillWithPagedKVCacheWrapper, VerticalSlash
from support import D, conversation

CHAT = conversation(3, (2, 2, 2), 9)  # 20 tokens


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Two requests over pages of 4: 5 of 7 tokens, and 10 of 10.
GOOD = {
    "qo_indptr": ints(0, 5, 15),
    "paged_kv_indptr": ints(0, 2, 5),
    "paged_kv_indices": ints(3, 1, 0, 5, 2),
    "paged_kv_last_page_len": ints(3, 2),
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim_qk": D,
    "page_size": 4,
    "modality_maps": [CHAT, CHAT],
    "head_patterns": [AShape(2, 3)] * 4,
    "q_data_type": torch.float32,
}


def wrapper_of(**changes) -> SparsePrefillWithPagedKVCacheWrapper:
    wrapper = SparsePrefillWithPagedKVCacheWrapper(None)
    arguments = GOOD | changes
    in_order = list(GOOD)[:8]
    rest = {name: value for name, value in arguments.items() if name not in in_order}
    wrapper.plan(*(arguments[name] for name in in_order), **rest)
    return wrapper


def tensors(**changes) -> dict:
    return {"q": torch.zeros(15, 4, D), "paged_kv_cache": (torch.zeros(6, 4, 2, D), torch.zeros(6, 4, 2, D))} | changes


def refuses(name: str, expected: str, got: str):
    """The sentence must have all three parts, each where it belongs."""
    words = f"SparsePrefillWithPagedKVCacheWrapper: {re.escape(name)}: expected .*{expected}.*, got .*{got}"
    return pytest.raises(ValueError, match=words)


def test_the_good_arguments_are_good():
    out = wrapper_of().run(**tensors())
    assert out.shape == (15, 4, D) and not out.any()


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_integers_of_numpy_and_torch_are_integers(integer):
    sizes = ("num_qo_heads", "num_kv_heads", "head_dim_qk", "page_size")
    wrapper = wrapper_of(dense_below=integer(3), **{name: integer(GOOD[name]) for name in sizes})
    same = wrapper_of(dense_below=3)
    assert torch.equal(wrapper.run(**tensors()), same.run(**tensors()))
    assert torch.equal(wrapper.visited_mask(integer(1), integer(2)), same.visited_mask(1, 2))


@pytest.mark.parametrize(
    ("arguments", "name", "expected", "got"),
    [
        ({"kv_layout": "HDN"}, "kv_layout", '"NHD" or "HND"', "'HDN'"),
        ({"backend": "cuda"}, "backend", "one of auto, torch, fa4, triton, flashinfer, reference", "'cuda'"),
        ({"block_q": 0}, "block_q", "an integer >= 1", "0"),
        ({"block_k": -4}, "block_k", "an integer >= 1", "-4"),
        ({"block_k": 4.0}, "block_k", "an integer >= 1", "4.0"),
    ],
)
def test_init_refuses(arguments, name, expected, got):
    with refuses(name, expected, got):
        SparsePrefillWithPagedKVCacheWrapper(None, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "where", "expected", "got"),
    [
        ("qo_indptr", [0, 5, 15], "qo_indptr", "a 1-D integer tensor", "list"),
        ("qo_indptr", torch.tensor([0.0, 5.0, 15.0]), "qo_indptr", "a 1-D integer tensor", "torch.float32"),
        ("qo_indptr", ints(0, 5, 15)[None], "qo_indptr", "a 1-D integer tensor", r"\[1, 3\]"),
        ("qo_indptr", ints(), "qo_indptr", "batch \\+ 1 values from 0 on", r"\[\]"),
        ("qo_indptr", ints(1, 5, 15), "qo_indptr", "from 0 on", r"\[1, 5, 15\]"),
        ("qo_indptr", ints(0, 15, 5), "qo_indptr", "do not decrease", r"\[0, 15, 5\]"),
        ("qo_indptr", ints(0, 8, 15), "qo_indptr[1]", "at most 7 rows", "8"),
        ("qo_indptr", ints(0, 5, 16), "qo_indptr[2]", "at most 10 rows", "11"),
        ("qo_indptr", ints(0, 5), "paged_kv_indptr", "2 values", "3"),
        ("qo_indptr", torch.tensor([False, True]), "qo_indptr", "a 1-D integer tensor", "torch.bool"),
        ("paged_kv_indptr", (0, 2, 5), "paged_kv_indptr", "a 1-D integer tensor", "tuple"),
        ("paged_kv_indptr", ints(0, 2), "paged_kv_indptr", "3 values", "2"),
        ("paged_kv_indptr", ints(1, 2, 5), "paged_kv_indptr", "from 0 on", r"\[1, 2, 5\]"),
        ("paged_kv_indptr", ints(0, 5, 2), "paged_kv_indptr", "do not decrease", r"\[0, 5, 2\]"),
        ("paged_kv_indices", [3, 1, 0, 5, 2], "paged_kv_indices", "a 1-D integer tensor", "list"),
        ("paged_kv_indices", torch.rand(5), "paged_kv_indices", "a 1-D integer tensor", "torch.float32"),
        ("paged_kv_indices", ints(3, 1, 0, 5), "paged_kv_indices", "at least 5 values", "4"),
        ("paged_kv_last_page_len", [3, 2], "paged_kv_last_page_len", "a 1-D integer tensor", "list"),
        ("paged_kv_last_page_len", ints(3), "paged_kv_last_page_len", "2 values", "1"),
        ("paged_kv_last_page_len", ints(3, 0), "paged_kv_last_page_len[1]", "1 to 4", "0"),
        ("paged_kv_last_page_len", ints(5, 2), "paged_kv_last_page_len[0]", "1 to 4", "5"),
        ("num_qo_heads", 3, "num_qo_heads", "a multiple of num_kv_heads=2", "3"),
        ("num_qo_heads", 0, "num_qo_heads", "a multiple of num_kv_heads=2", "0"),
        ("num_qo_heads", 4.0, "num_qo_heads", "a multiple of num_kv_heads=2", "4.0"),
        ("num_qo_heads", "4", "num_qo_heads", "a multiple of num_kv_heads=2", "'4'"),
        ("num_kv_heads", True, "num_kv_heads", "an integer >= 1", "True"),
        ("num_kv_heads", 0, "num_kv_heads", "an integer >= 1", "0"),
        ("head_dim_qk", 0, "head_dim_qk", "an integer >= 1", "0"),
        ("head_dim_qk", 8.0, "head_dim_qk", "an integer >= 1", "8.0"),
        ("page_size", 0, "page_size", "an integer >= 1", "0"),
        ("page_size", 4.0, "page_size", "an integer >= 1", "4.0"),
        ("dense_below", -1, "dense_below", "an integer >= 0", "-1"),
        ("dense_below", "9", "dense_below", "an integer >= 0", "'9'"),
        ("dense_below", 1.5, "dense_below", "an integer >= 0", "1.5"),
        ("basis", 3, "basis", "a Basis or None", "3"),
        ("modality_maps", None, "modality_maps", "a list of 2 maps", "None"),
        ("modality_maps", CHAT, "modality_maps", "a list of 2 maps", "ModalityMap"),
        ("modality_maps", [CHAT], "modality_maps", "2 maps, one for each request", "1"),
        ("modality_maps", [CHAT, None], "modality_maps[1]", "a ModalityMap", "None"),
        ("modality_maps", [CHAT, conversation(9)], "modality_maps[1]", "a length of at least 10", "9"),
        ("head_patterns", [Dense()] * 3, "head_patterns", r"4 patterns \(or one for all\)", "3"),
        ("head_patterns", [], "head_patterns", r"4 patterns \(or one for all\)", "0"),
        (
            "head_patterns",
            [Dense(), Dense(), 3, Dense()],
            "head_patterns[2]",
            "a pattern or a boundary",
            "3",
        ),
        ("head_patterns", "dense", "head_patterns[0]", "a pattern or a boundary", "'dense'"),
        ("head_patterns", None, "head_patterns[0]", "a pattern or a boundary", "None"),
        ("sm_scale", "0.1", "sm_scale", "a number", "'0.1'"),
        ("sm_scale", float("nan"), "sm_scale", "a number", "nan"),
        ("sm_scale", float("inf"), "sm_scale", "a number", "inf"),
        ("sm_scale", True, "sm_scale", "a number", "True"),
        ("q_data_type", torch.int32, "q_data_type", "one of float32, bfloat16, float16", "torch.int32"),
        ("kv_data_type", "bool", "kv_data_type", "one of .*float8_e4m3fn", "'bool'"),
        ("q_data_type", "float33", "q_data_type", "a torch dtype or its name", "'float33'"),
        ("q_data_type", 32, "q_data_type", "a torch dtype or its name", "32"),
        ("kv_data_type", "manual_seed", "kv_data_type", "a torch dtype or its name", "'manual_seed'"),
    ],
)
def test_plan_refuses(name, value, where, expected, got):
    with refuses(where, expected, got):
        wrapper_of(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected", "got"),
    [
        ("q", torch.zeros(14, 4, D), r"the shape \(15, 4, 8\)", r"\(14, 4, 8\)"),
        ("q", torch.zeros(15, 2, D), r"the shape \(15, 4, 8\)", r"\(15, 2, 8\)"),
        ("q", torch.zeros(15, 4 * D), r"the shape \(15, 4, 8\)", r"\(15, 32\)"),
        ("q", torch.zeros(15, 4, D).half(), "the planned dtype torch.float32", "torch.float16"),
        ("paged_kv_cache", torch.zeros(6, 4, 2, D), "a 5-D tensor .* or a tuple", r"\(6, 4, 2, 8\)"),
        ("paged_kv_cache", torch.zeros(6, 3, 4, 2, D), "a 5-D tensor .* or a tuple", r"\(6, 3, 4, 2, 8\)"),
        ("paged_kv_cache", (torch.zeros(6, 4, 2, D),), "a tuple", "1"),
        ("paged_kv_cache", (torch.zeros(6, 2, 4, D),) * 2, r"page_size=4, Hkv=2, D=8\) in NHD", r"\(6, 2, 4, 8\)"),
        ("paged_kv_cache", (torch.zeros(6, 4, 2, 16),) * 2, "page_size=4, Hkv=2, D=8", r"\(6, 4, 2, 16\)"),
        ("paged_kv_cache", (torch.zeros(24, 2, D),) * 2, "page_size=4, Hkv=2, D=8", r"\(24, 2, 8\)"),
        ("paged_kv_cache", (torch.zeros(6, 4, 2, D).half(),) * 2, "the planned dtype torch.float32", "torch.float16"),
        (
            "paged_kv_cache",
            (torch.zeros(6, 4, 2, D), torch.zeros(6, 4, 2, D).half()),
            "the planned dtype torch.float32",
            "torch.float16",
        ),
        ("paged_kv_cache", (torch.zeros(6, 4, 2, D), torch.zeros(5, 4, 2, D)), "6 pages", "5"),
        ("paged_kv_cache", (torch.zeros(5, 4, 2, D),) * 2, "at least 6 pages", "5"),
        ("q", None, r"a tensor of the shape \(15, 4, 8\)", "NoneType"),
        ("paged_kv_cache", None, "a 5-D tensor .* or a tuple", "NoneType"),
        ("paged_kv_cache", (torch.zeros(6, 4, 2, D), None), "tensors of k and of v", "NoneType"),
        ("k_scale", "2", "a number", "'2'"),
        ("k_scale", float("nan"), "a number", "nan"),
        ("v_scale", None, "a number", "None"),
        ("out", [0.0], r"a tensor of the shape \(15, 4, 8\)", "list"),
        ("out", torch.zeros(15, 4, 4), r"the shape \(15, 4, 8\)", r"\(15, 4, 4\)"),
        ("out", torch.zeros(15, 4, D).half(), "the dtype torch.float32", "torch.float16"),
        ("lse", torch.zeros(15, 2), r"the shape \(15, 4\)", r"\(15, 2\)"),
        ("lse", torch.zeros(15, 4).double(), "the dtype torch.float32", "torch.float64"),
    ],
)
def test_run_refuses(name, value, expected, got):
    wrapper = wrapper_of()
    with refuses(name, expected, got):
        wrapper.run(**tensors(**{name: value}))


def test_a_negative_page_is_refused():
    with refuses("paged_kv_indices", "values >= 0", "-1"):
        wrapper_of(paged_kv_indices=ints(3, 1, 0, -1, 2)).run(**tensors())


def test_what_belongs_to_the_other_layout_is_refused():
    wrapper = SparsePrefillWithPagedKVCacheWrapper(None, "HND")
    wrapper.plan(**GOOD)
    with refuses("paged_kv_cache", "Hkv=2, .* in HND layout", r"\(6, 2, 4, 8\)"):
        wrapper.run(**tensors())
    wrapper.run(**tensors(paged_kv_cache=(torch.zeros(6, 2, 4, D),) * 2))


@pytest.mark.parametrize(
    "use",
    [
        lambda wrapper: wrapper.run(**tensors()),
        lambda wrapper: wrapper.density,
        lambda wrapper: wrapper.visited_mask(0, 0),
    ],
)
def test_nothing_can_be_asked_before_plan(use):
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        use(SparsePrefillWithPagedKVCacheWrapper(None))


def test_the_density_of_an_estimated_pattern_is_not_known_before_run():
    wrapper = wrapper_of(head_patterns=[VerticalSlash(3, 3)])
    for use in (lambda: wrapper.density, lambda: wrapper.visited_mask(0, 0)):
        with pytest.raises(ValueError, match=r"VerticalSlash.*is estimated, so its plan needs q and the keys"):
            use()
    wrapper.run(**tensors())
    assert bool((wrapper.density > 0).all())


@pytest.mark.parametrize(("request_", "head", "word"), [(2, 0, "request"), (-1, 0, "request"), (0, 4, "head")])
def test_visited_mask_refuses_what_is_not_there(request_, head, word):
    wrapper = wrapper_of()
    with refuses(word, "0 to", str(max(request_, head) if request_ >= 0 else request_)):
        wrapper.visited_mask(request_, head)


@pytest.mark.parametrize(("request_", "head", "word", "got"), [("0", 0, "request", "'0'"), (0, None, "head", "None")])
def test_visited_mask_refuses_what_is_no_number(request_, head, word, got):
    with refuses(word, "0 to", got):
        wrapper_of().visited_mask(request_, head)


def test_a_failed_plan_does_not_leave_half_of_it_behind():
    """After an error the wrapper still runs what was planned before."""
    wrapper = wrapper_of()
    before = wrapper.run(**tensors(q=torch.ones(15, 4, D)))
    with pytest.raises(ValueError, match="modality_maps"):
        wrapper.plan(**(GOOD | {"modality_maps": [CHAT, conversation(9)]}))
    assert torch.equal(wrapper.run(**tensors(q=torch.ones(15, 4, D))), before)

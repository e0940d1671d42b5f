"""Low-rank forms of q . k from a checkpoint's weights alone: the RoPE pairs that its projections make large.

RoPE turns pairs of dimensions, so q . k is a sum over pairs, each with an angle of its own. With hidden states of
variance 1 after the norm, the mean squares of a pair in q and in k follow from the rows of the projections, times the
norm's gain, and the biases. The pairs with the largest product of both are taken as they are: A and B pick dimensions.
It is compared with bases from real queries and keys, and nothing but that comparison uses it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from sglang_mminfer.head_config import ModelFingerprint
from sglang_mminfer.patterns.basis import Basis

NAME = re.compile(r"layers\.(\d+)\.(self_attn\.(?:q|k)_proj\.(?:weight|bias)|input_layernorm\.weight)$")


def weight_forms(model_path: Path, model: ModelFingerprint, rank: int) -> dict[int, Basis]:
    """The forms of every layer: float32 [kv_heads, rank, D], the same in queries and keys.

    Raises:
        ValueError: an odd rank, or a checkpoint that names its projections otherwise.
    """
    if rank % 2:
        raise ValueError(f"rank: expected whole RoPE pairs, an even number, got {rank}")
    tensors: dict[tuple[int, str], torch.Tensor] = {}
    for path in sorted(model_path.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if (found := NAME.search(name)) and "visual" not in name and "vision" not in name:
                    tensors[int(found[1]), found[2]] = file.get_tensor(name).double()
    layers = {}
    for layer in range(model.layers):
        if (layer, "self_attn.q_proj.weight") not in tensors:
            raise ValueError(f"{model_path}: layer {layer}: no self_attn.q_proj.weight")
        squares = []
        for kind, heads in (("q", model.heads), ("k", model.kv_heads)):
            weight = tensors[layer, f"self_attn.{kind}_proj.weight"] * tensors[layer, "input_layernorm.weight"]
            of_dims = weight.square().sum(dim=1)
            bias = tensors.get((layer, f"self_attn.{kind}_proj.bias"))
            of_dims = of_dims + (bias.square() if bias is not None else 0)
            pairs = of_dims.view(heads, 2, model.head_dim // 2).sum(dim=1)  # dimension i turns with i + D / 2
            squares.append(pairs.view(model.kv_heads, -1, model.head_dim // 2).sum(dim=1))
        best = (squares[0] * squares[1]).topk(rank // 2, dim=1).indices
        dims = torch.stack([best, best + model.head_dim // 2], dim=2).flatten(1)
        picked = torch.nn.functional.one_hot(dims, model.head_dim).float()
        layers[layer] = Basis(picked, picked)
    return layers

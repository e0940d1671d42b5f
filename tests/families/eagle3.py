"""Tiny EAGLE3 heads for tiny models: a draft model with the files, keys and config of released ones.

A random head would propose nothing that a target takes. This one remembers answers: behind a word it proposes the word
that most often followed it in them. So a target takes many of its proposals, and not all.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

SEED = 0
SHARPNESS = 3.0
"""Factor on queries and keys, so that a row finds its own word among thousands of others."""


def make(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    answers: Iterable[Sequence[int]],
    layers: Sequence[int],
) -> Path:
    """Writes a head for the checkpoint `target` to the folder `path`, which does not exist yet.

    A row knows a word by its embedding x, of length sqrt(width). Its attention finds that word, each unit of its MLP
    knows one word and answers with the vector of the next, and the output layer has these vectors.

    Args:
        answers: token ids.
        layers: those of the target whose outputs the head is given.
    """
    from safetensors.torch import save_file

    follower = _followers(answers)
    embedding, text = _embedding(Path(target)), _text_config(Path(target))
    vocabulary, width = embedding.shape
    known = torch.tensor([*follower])
    draw = torch.Generator().manual_seed(SEED)
    words = torch.nn.functional.normalize(torch.randn(vocabulary, width, generator=draw))
    x = embedding / embedding.square().mean(1, keepdim=True).sqrt()
    head_dim = 2 * width
    # RoPE turns dimension j together with j + width, and the upper half of these pairs hardly at all.
    still = torch.cat([torch.arange(width // 2, width), torch.arange(width // 2, width) + width])
    find, take, give = torch.zeros(head_dim, 2 * width), torch.zeros(head_dim, 2 * width), torch.zeros(width, head_dim)
    find[still, torch.arange(width)] = SHARPNESS
    take[:width, :width] = torch.eye(width)
    give[:, :width] = torch.eye(width)
    layer = {
        **{
            f"{name}.weight": torch.ones(width)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        "self_attn.q_proj.weight": find,
        "self_attn.k_proj.weight": find.clone(),
        "self_attn.v_proj.weight": take,
        "self_attn.o_proj.weight": give,
        "mlp.gate_proj.weight": x[known] / 16,
        "mlp.up_proj.weight": x[known] / 16,
        "mlp.down_proj.weight": words[torch.tensor([follower[int(word)] for word in known])].T.contiguous(),
    }
    weights = {
        # The target's states pass through, and decide little.
        "fc.weight": 1e-3 * torch.randn(width, len(layers) * width, generator=draw),
        "norm.weight": torch.ones(width),
        "lm_head.weight": words,
        **{f"midlayer.{name}": value for name, value in layer.items()},
    }
    folder = Path(path)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": len(known),
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "draft_vocab_size": vocabulary,
        "max_position_embeddings": text["max_position_embeddings"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e16},
        "tie_word_embeddings": False,
        "dtype": "float32",
        "target_hidden_size": width,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers), "use_aux_hidden_state": True},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def _followers(answers: Iterable[Sequence[int]]) -> dict[int, int]:
    """For each token the one that most often stands behind it."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for answer in answers:
        for word, following in pairwise(answer):
            counts[word][following] += 1
    return {word: found.most_common(1)[0][0] for word, found in counts.items()}


def _text_config(target: Path) -> dict[str, int]:
    return json.loads((target / "config.json").read_text())["text_config"]


def _embedding(target: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    weights = load_file(target / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    return weights[name]

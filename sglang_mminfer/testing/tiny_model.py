"""Tiny random checkpoints of real architectures, made locally: nothing has to be downloaded.

    python -m sglang_mminfer.testing.tiny_model PATH [--arch qwen2_vl] [--layers 4] ...

A checkpoint is complete (config, weights, tokenizer, chat template, image and video processor), so transformers and
SGLang load it through the same code as a released checkpoint. Its answers are nonsense, but they are not degenerate,
because a test must be able to see a wrong mask:

* Queries and keys have a spread that makes softmax peaked: each row depends on a handful of keys, and dropping one
  of them changes the answer.
* The output layer mutes all tokens but whole words. So a greedy answer is readable, never stops by chance, and its
  text encodes to the very tokens that were generated. A later turn therefore finds the whole conversation, answers
  included, in the radix cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from sglang_mminfer.testing.tiny_tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    make_tokenizer,
    spoken_tokens,
    vocabulary_rows,
)
from sglang_mminfer.testing.tiny_tokenizer import PLACEHOLDERS as PLACEHOLDERS  # for makers of other checkpoints
from sglang_mminfer.testing.tiny_tokenizer import WORDS as WORDS

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE_FILE = "tiny_model.json"
RECIPE_VERSION = 2
"""Increased when the same arguments make other bytes, so that stale checkpoints are made again."""

# Images and videos shrink to as little as 4 tokens, so that a test can count its tokens on its fingers.
MIN_PIXELS = 4 * 28 * 28
MAX_IMAGE_PIXELS = 1280 * 28 * 28
MAX_VIDEO_PIXELS = 768 * 28 * 28

# Standard deviation of a row's attention logits, chosen so that a handful of keys out of a hundred carry a row.
ATTENTION_SPREAD = 3.0
# The same in the vision tower. It need not be peaked, and all later layers magnify its rounding errors.
VISION_SPREAD = 1.0
# Standard deviation of the logits of words, and the factor on the logits of all other tokens.
LOGIT_SPREAD = 2.5
MUTED = 0.02
# By how many LOGIT_SPREADs the last word's own logit falls, if the hidden state is the word's embedding alone.
REPULSION = 4.0
# Standard deviation of a token embedding, against about 1 for what each layer adds: the last token must not decide
# the answer alone.
EMBEDDING_SPREAD = 1.0


class Recipe(TypedDict, total=False):
    """The arguments of a tiny model. DEFAULTS has their defaults."""

    seed: int
    """The random seed of the weights."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    """Must equal heads * head_dim if it is given."""
    intermediate: int
    """Width of the MLP; 0 means 2 * hidden."""
    vocab: int
    """Rows of the embedding; 0 means the size of the tokenizer's vocabulary, rounded up to a multiple of 64."""
    max_positions: int
    vision_depth: int
    vision_hidden: int
    vision_heads: int
    vision_full_blocks: int
    """Qwen2.5-VL: how many of the last vision blocks see whole pictures instead of windows. The default is 0, because
    SGLang lets such blocks see the whole video, and transformers only one frame: not comparable, and quadratic."""
    rope_theta: float


DEFAULTS: dict[str, int | float] = {
    "seed": 0,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 0,
    "vocab": 0,
    "max_positions": 65536,
    "vision_depth": 2,
    "vision_hidden": 64,
    "vision_heads": 2,
    "vision_full_blocks": 0,
    "rope_theta": 1e6,
}


def make_tiny_qwen2_5_vl(path: str | os.PathLike[str], **recipe: Unpack[Recipe]) -> Path:
    """Write a tiny random Qwen2.5-VL to the folder `path` and return the folder. Keyword arguments: `Recipe`.

    The same arguments give the same bytes. A folder that holds the same recipe already is left alone; a folder with
    another recipe is made again.

    Raises:
        ValueError: the sizes do not fit each other, or `path` holds something that this function did not make.
    """
    return _make(path, "qwen2_5_vl", dict(recipe))


def make_tiny_qwen2_vl(path: str | os.PathLike[str], **recipe: Unpack[Recipe]) -> Path:
    """Write a tiny random Qwen2-VL to the folder `path`. Arguments and errors are those of `make_tiny_qwen2_5_vl`."""
    return _make(path, "qwen2_vl", dict(recipe))


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    recipe = dict(arguments)
    hidden = recipe.pop("hidden", None)
    unknown = sorted(set(recipe) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"tiny model: unknown argument {unknown[0]!r}, expected one of {', '.join(DEFAULTS)}")
    full = {**DEFAULTS, **recipe}
    for name in DEFAULTS:
        low = 0 if name in ("seed", "intermediate", "vocab", "vision_full_blocks") else 1
        if not isinstance(full[name], int | float) or full[name] < low:
            raise ValueError(f"tiny model: {name}: expected a number >= {low}, got {full[name]!r}")
    if hidden is not None and hidden != full["heads"] * full["head_dim"]:
        raise ValueError(
            f"tiny model: hidden: expected heads * head_dim = {full['heads'] * full['head_dim']} "
            f"(Qwen2's head_dim is hidden / heads), got {hidden}"
        )
    if full["heads"] % full["kv_heads"]:
        raise ValueError(f"tiny model: kv_heads: {full['kv_heads']} does not divide heads = {full['heads']}")
    if full["head_dim"] % 16:
        raise ValueError(
            f"tiny model: head_dim: expected a multiple of 16 (the three m-rope sections take an eighth and "
            f"twice three sixteenths of it), got {full['head_dim']}"
        )
    if full["vision_hidden"] % (8 * full["vision_heads"]):
        raise ValueError(
            f"tiny model: vision_hidden: expected a multiple of 8 * vision_heads, got {full['vision_hidden']}"
        )
    full["intermediate"] = full["intermediate"] or 2 * full["heads"] * full["head_dim"]
    return full


def _make(path: str | os.PathLike[str], arch: str, arguments: dict[str, Any]) -> Path:
    recipe = _checked(arguments)
    return make_checkpoint(path, {"arch": arch, **recipe}, lambda fresh: _write(fresh, arch, recipe))


def make_checkpoint(path: str | os.PathLike[str], recipe: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Let `write` fill the folder `path`, unless the folder holds the same recipe already. Returns the folder.

    Raises:
        ValueError: `path` holds something that this function did not make.
    """
    import transformers

    target = Path(path)
    recipe = {"version": RECIPE_VERSION, "transformers": transformers.__version__, **recipe}
    if _holds(target, recipe):
        return target
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not _recipe(target))):
        raise ValueError(f"{target}: expected an empty folder or a tiny model, found something else")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the target, then move into place: another process must never read half a checkpoint.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        write(fresh)
        (fresh / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        try:
            os.replace(fresh, target)
        except OSError:
            if not _holds(target, recipe):  # another process may have made the same one in the meantime
                raise
    return target


def _recipe(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / RECIPE_FILE).read_text())
    except (OSError, ValueError):
        return None


def _holds(path: Path, recipe: dict[str, Any]) -> bool:
    return _recipe(path) == recipe


def _write(path: Path, arch: str, recipe: dict[str, Any]) -> None:
    processor = _processor(arch)
    tokenizer = processor.tokenizer
    rows = vocabulary_rows(tokenizer)
    if recipe["vocab"]:
        if recipe["vocab"] < len(tokenizer):
            raise ValueError(f"tiny model: vocab: the tokenizer has {len(tokenizer)} tokens, got {recipe['vocab']}")
        rows = recipe["vocab"]
    model = _model(arch, recipe, rows, tokenizer)
    draw_weights(model, recipe["seed"], spoken_tokens(tokenizer, rows))
    save_model(model, path)
    save_processor(processor, path)


def save_all(
    model: Any,
    processor: Any,
    tokenizer: Any,
    rows: int,
    seed: int,
    path: Path,
    adjust: Callable[[Any], None] = lambda model: None,
) -> None:
    """Draws the weights of a new model, in float32, and writes it and its processor to the folder `path`.

    Args:
        rows: of its token embedding.
        adjust: changes the weights that were drawn.
    """
    model.generation_config = generation_config(tokenizer)
    model = model.to(torch.float32).eval()
    draw_weights(model, seed, spoken_tokens(tokenizer, rows))
    adjust(model)
    save_model(model, path)
    save_processor(processor, path)


def save_processor(processor: Any, path: Path) -> None:
    """Write a processor for text, images and perhaps videos, with the files of a released checkpoint."""
    processor.save_pretrained(path)
    # Released checkpoints have these two files, and some loaders look for nothing else.
    processor.image_processor.save_pretrained(path)
    if hasattr(processor, "video_processor"):
        video = processor.video_processor.to_dict()
        (path / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2, sort_keys=True) + "\n")


def save_model(model: Any, path: Path) -> None:
    """Write config and weights, without a progress bar."""
    from transformers.utils import logging

    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    for file in path.glob("*.safetensors"):
        file.chmod(0o644)  # save_pretrained makes them readable for the owner only


def _processor(arch: str) -> Any:
    import transformers

    tokenizer = make_tokenizer()
    image = transformers.Qwen2VLImageProcessor(size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_IMAGE_PIXELS})
    # Released checkpoints leave `cap_pixels_per_frame` unset; False means the same, without a warning.
    video = transformers.Qwen2VLVideoProcessor(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_VIDEO_PIXELS}, cap_pixels_per_frame=False
    )
    kind = transformers.Qwen2_5_VLProcessor if arch == "qwen2_5_vl" else transformers.Qwen2VLProcessor
    return kind(image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=CHAT_TEMPLATE)


def rename_weights(path: Path, renamed: Callable[[str], str]) -> None:
    """Gives each weight of a checkpoint without shards another name."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    save_file({renamed(name): weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


def _model(arch: str, recipe: dict[str, Any], rows: int, tokenizer: Any) -> Any:
    import transformers

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head_dim, hidden = recipe["head_dim"], recipe["heads"] * recipe["head_dim"]
    text = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": recipe["intermediate"],
        "num_hidden_layers": recipe["layers"],
        "num_attention_heads": recipe["heads"],
        "num_key_value_heads": recipe["kv_heads"],
        "max_position_embeddings": recipe["max_positions"],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(recipe["rope_theta"]),
            # Time, rows, columns. The real model has 16, 24, 24 of 64.
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "use_sliding_window": False,
    }
    # Released checkpoints call it "in_chans", and SGLang's Qwen2-VL reads this name.
    shared = {"depth": recipe["vision_depth"], "num_heads": recipe["vision_heads"], "patch_size": 14, "in_chans": 3}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    config: Any
    if arch == "qwen2_5_vl":
        vision: dict[str, Any] = {
            **shared,
            "hidden_size": recipe["vision_hidden"],
            "intermediate_size": 2 * recipe["vision_hidden"],
            "out_hidden_size": hidden,
            "window_size": 112,
            "fullatt_block_indexes": list(range(recipe["vision_depth"]))[
                max(0, recipe["vision_depth"] - recipe["vision_full_blocks"]) :
            ],
            "tokens_per_second": 2,
        }
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        model: Any = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {**shared, "embed_dim": recipe["vision_hidden"], "hidden_size": hidden, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    model.generation_config = generation_config(tokenizer)
    return model.to(torch.float32).eval()


def generation_config(tokenizer: Any) -> Any:
    """A GenerationConfig: greedy, with the stop tokens of `make_tokenizer`."""
    import transformers

    pad, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    return transformers.GenerationConfig(do_sample=False, bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad])


@torch.no_grad()
def draw_weights(model: Any, seed: int, spoken: torch.Tensor) -> None:
    """Set every weight to a value that depends on the weight's name and the seed, not on the order of loading.

    Args:
        spoken: bool [vocabulary], the tokens of an answer, as `spoken_tokens` gives them.
    """
    for i, (name, weight) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        noise = torch.randn(weight.shape, generator=generator)
        if re.search(r"\b(q|k)_norm\.weight$", name):  # it undoes the spread of q_proj and k_proj
            weight.copy_(math.sqrt(ATTENTION_SPREAD) * (1 + 0.1 * noise))
        elif "norm" in name or name.endswith("ln_q.weight"):
            weight.copy_(torch.zeros_like(weight) if name.endswith("bias") else 1 + 0.1 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif name.endswith("embed_tokens.weight"):
            weight.copy_(EMBEDDING_SPREAD * noise)
        elif name.endswith("lm_head.weight"):
            # A row of unit variance gets logits of standard deviation sqrt(fan in) * (spread of the weights).
            scale = torch.where(spoken, LOGIT_SPREAD, LOGIT_SPREAD * MUTED) / math.sqrt(weight.shape[1])
            weight.copy_(noise * scale[:, None])
        else:
            # All experts are one tensor: [experts, out, in].
            fan_in = weight.shape[2] if ".experts." in name and weight.ndim == 3 else weight[0].numel()
            spread = 1.0
            if re.search(r"\b(q|k)_proj\.weight$", name):
                spread = math.sqrt(ATTENTION_SPREAD)
            elif name.endswith(".qkv.weight"):  # q, k and v of the vision tower, stacked
                rows = torch.full((3, weight.shape[0] // 3), math.sqrt(VISION_SPREAD))
                rows[2] = 1.0
                weight.copy_(noise * rows.reshape(-1, 1) / math.sqrt(fan_in))
                continue
            weight.copy_(noise * spread / math.sqrt(fan_in))
    # Every word lowers its own logit, so that an answer does not repeat one word for ever.
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight[spoken] -= REPULSION * LOGIT_SPREAD / embedding.shape[1] * embedding[spoken]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mminfer.testing.tiny_model",
        description="Write a tiny random checkpoint of a real vision-language architecture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("path", help="the folder to write")
    parser.add_argument("--arch", choices=("qwen2_5_vl", "qwen2_vl"), default="qwen2_5_vl")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    path, arch = options.pop("path"), options.pop("arch")
    try:
        print(_make(path, arch, options))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RECIPE_FILE = "tiny_model.json"
RECIPE_VERSION = 2
"""Increased when the same arguments make other bytes, so that stale checkpoints are made again."""

# Qwen2.5-VL's special tokens in their order. Their ids follow the byte-level vocabulary, as in the real tokenizer.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The words of an answer. Single words, because each becomes one token, together with the space before it.
WORDS = """
a above across after again air all along always an and animal another any apple are arm around arrow as ask at
autumn away back bag ball bank bar bare basket be bear beat bed bell below bend beside between big bird bitter
black blue board boat body bone book boot bottle box branch brave bread break breath brick bridge bright broad
brown brush bucket build bulb burn bus button by cake call calm camera candle cap car card care carry cart cat
chain chair chalk change cheese child circle city clay clean clear climb clock cloth cloud coal coat coin cold
colour come cook copper copy cord cork corner cotton count country cover cow crack crane cross crowd cry cup
curtain curve cut dance dark day deep desk dish dog door down drain draw dress drink drop dry duck dust ear early
earth east edge egg eight empty end evening every eye face fair fall family far farm fast feather field fight fire
first fish five flag flame flat flight floor flower fly fold foot fork four frame free fresh friend frog from
front fruit full garden gate girl give glass glove go goat gold grain grass green grey ground group hair half hall
hammer hand happy harbour hard hat he head heart heavy help high hill hold hole home hook horn horse hot hour
house ice in ink iron island it jar jelly join juice jump keep key kind king kite knee knife knot lake lamp land
large last late laugh leaf learn left leg lemon letter light line lion lip list little lock long look loud low
machine man many map mark market match meal meat meet metal middle milk mirror moon more morning mountain mouth
move mud music nail name narrow near neck needle nest net new night nine noise north nose not nut oak ocean of
office oil old on one open orange other oven over owl page paint pan paper park part past path peace pen pencil
people picture pig pin pipe plane plant plate play pocket point pond pot press price print pull pump purple push
quick quiet rabbit rail rain raise range read red rest rice ring river road rock rod roll roof room root rope
rose round row run sail salt sand say school sea seat second see seed seven shade shake shape sharp sheep shelf
ship shirt shoe shop short shore side sign silk silver simple sing sister six skin sky sleep slope slow small
smile smoke smooth snail snake snow soap sock soft some song south space spade spoon spring square stage stamp
star start station steam stem step stick still stone stop store storm story straight street strong summer sun
sweet swim table tail take tall tea tell ten tent that the then there they thick thin three throat thumb ticket
tiger time tin to toe together tongue tooth top town toy track train tree triangle trumpet turn two umbrella
under up valley very view violin voice wait walk wall want warm wash watch water wave we wet wheel where while
whistle white wide wind window wing winter wire with wolf woman wood word work world worm write yard year yellow
yes you young zebra
"""

# Further words of the vocabulary, so that a prompt does not fall apart into letters.
PROMPT_WORDS = """
You are a helpful assistant. user system assistant What is this? What do you see in the video? How many? Describe
the picture. Is that so? And now? Which one came first? Compare both. Where did it go? Tell me more. Why? Who?
Please answer in one word. Thank you. I The A In It There
"""

CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.text is defined -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

PLACEHOLDERS = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
"""What the chat template writes for a picture and for a video."""

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


def vocabulary_rows(tokenizer: Any) -> int:
    """Rows of an embedding for all tokens: a multiple of 64, as in released checkpoints."""
    return -(-len(tokenizer) // 64) * 64


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


def _train_tokenizer() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE merges in which every word of the lists is one token (Qwen2's own pre-tokenizer)."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,  # no limit: the merges end when every word is one token
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    spaced = [f" {word}" for word in WORDS.split()]
    # A word of a prompt may also stand at the start of a line, without a space. Prompt words weigh more, so that
    # their merges come before those of other words with the same letters.
    prompt = [form for word in PROMPT_WORDS.split() for form in (word, f" {word}") for _ in range(100)]
    tokenizer.train_from_iterator([*spaced, *prompt], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    # Newer `tokenizers` write a merge as a pair, older ones as "left right".
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["merges"]]
    return state["vocab"], [(left, right) for left, right in pairs]


def make_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
    named: Mapping[str, str] | None = None,
) -> Any:
    """Qwen2's tokenizer with a small vocabulary, then the special tokens in their order, the padding token first.

    An empty `chat_template` means none. `named` are attributes that hold some of the special tokens.
    """
    import transformers

    vocab, merges = _train_tokenizer()
    vocab = {**vocab, **{token: len(vocab) + i for i, token in enumerate(special_tokens)}}
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special_tokens[1:]),
        chat_template=chat_template or None,
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        model_specific_special_tokens=dict(named or {}),
    )


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


def spoken_tokens(tokenizer: Any, rows: int) -> torch.Tensor:
    """bool [rows]: True for the tokens that are a word of WORDS with the space before it."""
    spoken = torch.zeros(rows, dtype=torch.bool)
    for word in WORDS.split():
        (token,) = tokenizer.encode(f" {word}", add_special_tokens=False)
        spoken[token] = True
    return spoken


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

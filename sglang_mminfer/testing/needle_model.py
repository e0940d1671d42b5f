"""An untrained small Qwen2.5-VL, with its processor, that learns to find needles in half an hour on one CPU core.

Like `tiny_model`, this makes a complete checkpoint of the real architecture, but one that is meant to be trained: it
has a small vocabulary in which each needle in a text is one token, and a processor that leaves pictures of 112 x 112
pixels as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sglang_mminfer.testing.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS
from sglang_mminfer.tools.needles.media_files import LARGEST_IMAGE, LARGEST_VIDEO, SMALLEST
from sglang_mminfer.tools.needles.task import HAY_WORDS, NEEDLE_WORDS

INIT_STD = 0.06
SIZES: dict[str, int] = {
    "hidden": 128,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 256,
    "vision_hidden": 64,
    "vision_heads": 2,
    "vision_depth": 1,
}


def make_processor() -> Any:
    """A Qwen2_5_VLProcessor: tokenizer, chat template, image and video processor."""
    import transformers
    from tokenizers import AddedToken, pre_tokenizers, trainers

    blank = transformers.Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    prompt = ["You", "are", "a", "helpful", "assistant.", "user", "system", "assistant"]
    words = [f" {word}" for word in HAY_WORDS] + [form for word in prompt for form in (word, f" {word}") * 100]
    blank.train_from_iterator(words, trainer)
    state = json.loads(blank.to_str())["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["merges"]]
    vocab = state["vocab"]
    vocab = {**vocab, **{token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)}}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=[(left, right) for left, right in pairs],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
    )
    # A needle and the space before it are one token, so that a needle in a text is one row of attention, as a card is.
    tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in NEEDLE_WORDS])
    image = transformers.Qwen2VLImageProcessor(size={"shortest_edge": SMALLEST, "longest_edge": LARGEST_IMAGE})
    video = transformers.Qwen2VLVideoProcessor(
        size={"shortest_edge": SMALLEST, "longest_edge": LARGEST_VIDEO}, cap_pixels_per_frame=False
    )
    return transformers.Qwen2_5_VLProcessor(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: Any, seed: int, **sizes: int) -> Any:
    """A Qwen2_5_VLForConditionalGeneration with weights drawn from `seed`, on the CPU in fp32."""
    import transformers

    size = {**SIZES, **sizes}
    head_dim = size["hidden"] // size["heads"]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": size["hidden"],
        "intermediate_size": size["intermediate"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "use_sliding_window": False,
    }
    vision = {
        "depth": size["vision_depth"],
        "hidden_size": size["vision_hidden"],
        "num_heads": size["vision_heads"],
        "intermediate_size": 2 * size["vision_hidden"],
        "out_hidden_size": size["hidden"],
        "patch_size": 14,
        "in_chans": 3,
        "window_size": 112,
        # Empty, because SGLang lets such a block see the whole video, and transformers only one frame.
        "fullatt_block_indexes": [],
        "tokens_per_second": 2,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model: Any = transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, INIT_STD)
            elif name.endswith("bias"):
                weight.zero_()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
    )
    return model


def save_checkpoint(model: Any, processor: Any, folder: Path) -> None:
    """Write a folder that SGLang and transformers can load: weights in bf16, config, tokenizer, processor."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    video = processor.video_processor.to_dict()
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)

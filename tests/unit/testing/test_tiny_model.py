"""Tiny checkpoints: complete, loaded unchanged by transformers and SGLang, the same every time."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.tiny_model import SPECIAL_TOKENS, WORDS, make_tiny_qwen2_5_vl, make_tiny_qwen2_vl

MAKERS = {"qwen2_5_vl": make_tiny_qwen2_5_vl, "qwen2_vl": make_tiny_qwen2_vl}

CONVERSATION = [
    {
        "role": "user",
        "content": [{"type": "video"}, {"type": "text", "text": "What is this?"}, {"type": "image"}],
    },
    {"role": "assistant", "content": " red fish over water"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And now?"}]},
]


@pytest.fixture(scope="module", params=sorted(MAKERS))
def checkpoint(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp("model") / request.param, layers=2)


@pytest.fixture(scope="module")
def processor(checkpoint):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def render(processor, messages=CONVERSATION):
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt(processor, text=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (3, h, w), generator=random, dtype=torch.uint8) for h, w in ((56, 84), (112, 56))]
    video = torch.randint(0, 256, (6, 3, 84, 112), generator=random, dtype=torch.uint8)
    return processor(text=[text or render(processor)], images=images, videos=[video], return_tensors="pt")


def test_it_is_the_real_architecture(checkpoint, model, processor):
    config = json.loads((checkpoint / "config.json").read_text())
    family = {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}[config["model_type"]]
    assert config["architectures"] == [f"{family}ForConditionalGeneration"] == [type(model).__name__]
    assert type(processor).__name__ == f"{family}Processor"
    text = model.config.get_text_config()
    assert 2 * sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads


def test_special_tokens_agree_with_the_config(model, processor):
    tokenizer, config = processor.tokenizer, model.config
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert config.image_token_id == processor.image_token_id == ids[SPECIAL_TOKENS.index("<|image_pad|>")]
    assert config.video_token_id == processor.video_token_id == ids[SPECIAL_TOKENS.index("<|video_pad|>")]
    assert config.vision_start_token_id == ids[SPECIAL_TOKENS.index("<|vision_start|>")]
    assert config.vision_end_token_id == ids[SPECIAL_TOKENS.index("<|vision_end|>")]
    assert tokenizer.eos_token_id == ids[SPECIAL_TOKENS.index("<|im_end|>")]
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    for token, index in zip(SPECIAL_TOKENS, ids):
        assert tokenizer.encode(f"a{token}b")[1] == index


@pytest.mark.parametrize(
    "text",
    [
        "What do you see in the video?",
        " many words of the list, and\n\nothers that are not in it: Ångström, 漢字, 🎬, \ttabs",
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Is that so?<|im_end|>\n",
    ],
)
def test_text_goes_round(processor, text):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_answer_of_words_reads_back_to_its_tokens(processor):
    tokenizer = processor.tokenizer
    words = [tokenizer.encode(f" {word}") for word in WORDS.split()]
    assert all(len(tokens) == 1 for tokens in words)
    answer = [tokens[0] for tokens in words[::-1]]
    before = tokenizer.encode("<|im_start|>assistant\n")
    text = tokenizer.decode(answer)
    assert tokenizer.encode(f"<|im_start|>assistant\n{text}<|im_end|>\n")[len(before) :][: len(answer)] == answer


def test_the_template_places_every_medium_in_its_turn(processor):
    assert render(processor) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What is this?"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n red fish over water<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>And now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = render(processor, [{"role": "system", "content": "Please answer in one word."}, *CONVERSATION])
    assert own.startswith("<|im_start|>system\nPlease answer in one word.<|im_end|>\n<|im_start|>user\n")
    assert own.count("<|im_start|>system") == 1


def test_a_longer_conversation_begins_with_the_shorter_one(processor):
    assert render(processor).startswith(render(processor, CONVERSATION[:1]))


def test_media_cost_what_their_grids_say(processor):
    inputs = prompt(processor)
    ids = inputs["input_ids"][0].tolist()
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4]]
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8]]
    assert ids.count(processor.image_token_id) == (24 + 32) // 4
    assert ids.count(processor.video_token_id) == 3 * 48 // 4


@torch.no_grad()
def greedy(model, inputs, steps=16):
    model.model.rope_deltas = None
    output = model(**inputs, logits_to_keep=1)
    tokens = []
    for _ in range(steps):
        tokens.append(int(output.logits[0, -1].argmax()))
        output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
    return tokens


def test_answers_are_words_and_depend_on_what_is_shown(model, processor):
    first, second = (greedy(model, prompt(processor, seed=seed)) for seed in (0, 1))
    assert first != second
    for tokens in (first, second):
        assert len(set(tokens)) >= 4
        assert set(processor.tokenizer.decode(tokens).split()) <= set(WORDS.split())


@torch.no_grad()
def test_a_few_hidden_keys_show(model, processor):
    inputs = dict(prompt(processor))
    placed = {k: v for k, v in inputs.items() if k.endswith("_thw") or k in ("mm_token_type_ids", "attention_mask")}
    if "second_per_grid_ts" in inputs:
        placed["second_per_grid_ts"] = torch.as_tensor(inputs["second_per_grid_ts"])
    positions, _ = model.model.get_rope_index(inputs["input_ids"], **placed)
    start = inputs["input_ids"][0].tolist().index(processor.video_token_id)
    logprobs = []
    for hidden in (0, 4):
        mask = inputs["attention_mask"].clone()
        mask[0, start + 8 : start + 8 + hidden] = 0
        logits = model(**{**inputs, "attention_mask": mask}, position_ids=positions, logits_to_keep=1).logits
        logprobs.append(logits[0, -1].log_softmax(-1))
    assert (logprobs[0] - logprobs[1]).abs().max() > 0.02


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    one, two, other = (make_tiny_qwen2_5_vl(tmp_path / str(i), layers=1, seed=seed) for i, seed in enumerate((3, 3, 4)))
    assert digest(one) == digest(two)
    differing = {name for name, value in digest(one).items() if digest(other)[name] != value}
    assert differing == {"model.safetensors", tiny_model.RECIPE_FILE}


def test_it_is_made_once_and_again_for_another_recipe(tmp_path):
    path = make_tiny_qwen2_5_vl(tmp_path / "m", layers=1)
    mark = path / "mark"  # a folder that is made again has none
    mark.touch()
    assert make_tiny_qwen2_5_vl(tmp_path / "m", layers=1, seed=0, hidden=128) == path
    assert mark.exists()
    make_tiny_qwen2_5_vl(tmp_path / "m", layers=1, heads=2, kv_heads=1, head_dim=16)
    assert json.loads((path / "config.json").read_text())["text_config"]["hidden_size"] == 32
    assert not mark.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected an empty folder or a tiny model"):
        make_tiny_qwen2_5_vl(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"layer": 2}, "unknown argument 'layer'"),
        ({"layers": 0}, "layers: expected a number >= 1, got 0"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads: 4 does not divide heads = 6"),
        ({"head_dim": 24}, "head_dim: expected a multiple of 16"),
        ({"hidden": 100}, "hidden: expected heads \\* head_dim = 128"),
        ({"vision_hidden": 20}, "vision_hidden: expected a multiple of 8"),
        ({"vocab": 300}, "vocab: the tokenizer has [0-9]+ tokens, got 300"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_qwen2_5_vl(tmp_path / "m", **recipe)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_one_and_explains_itself(tmp_path, capsys):
    assert tiny_model.main([str(tmp_path / "m"), "--arch", "qwen2_vl", "--layers", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "qwen2_vl"
    with pytest.raises(SystemExit):
        tiny_model.main([str(tmp_path / "n"), "--head-dim", "20"])
    assert "head_dim: expected a multiple of 16" in capsys.readouterr().err

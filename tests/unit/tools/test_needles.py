"""Needle conversations: inputs built without files equal those of the processor, and the models find needles."""

from pathlib import Path

import numpy as np
import pytest
import torch

import network
import score
from sglang_mminfer.testing import needle_model
from sglang_mminfer.tools.needles import glyphs, media_files, pictures, sequence, task

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "needle_vlm"
MODELS = {"video": task.video_conversation, "mixed": task.mixed_conversation}


@pytest.fixture(scope="module")
def processor():
    return needle_model.make_processor()


def _conversation(kind: str, seed: int, pairs: int = 16, needles: int = 8) -> task.Conversation:
    random = np.random.default_rng(seed)
    return MODELS[kind](pairs, needles, random)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(5))
def test_a_relay_has_the_digit_of_a_plain_needle_before_it(kind, seed):
    conversation = _conversation(kind, seed, needles=12)
    assert conversation == _conversation(kind, seed, needles=12)
    before = {}
    for turn in conversation.turns:
        for part in turn.parts:
            for needle in part.needles:
                if needle.same_as:
                    assert before[needle.same_as].same_as is None
                    assert needle.digit == before[needle.same_as].digit
                    assert needle.shown == needle.same_as
                assert needle.key not in before
                before[needle.key] = needle
        assert turn.answer == before[turn.question].digit
        assert turn.relay == (before[turn.question].same_as is not None)


def test_a_quarter_of_a_mixed_conversation_is_text():
    parts = [part for seed in range(20) for part in _conversation("mixed", seed, pairs=64).parts]
    text = sum(part.tokens for part in parts if part.kind == "text")
    assert 0.2 < text / sum(part.tokens for part in parts) < 0.3
    assert {needle_kind.kind for needle_kind in parts if needle_kind.needles} == {"text", "image", "video"}


@pytest.mark.parametrize("kind,seed", [("video", 2), ("video", 3), ("mixed", 0), ("mixed", 4)])
def test_a_sequence_is_what_template_processor_and_the_rule_of_positions_make_of_it(processor, kind, seed):
    from PIL import Image

    from sglang_mminfer.testing import mrope

    conversation = _conversation(kind, seed, pairs=24)
    vocabulary = sequence.Vocabulary(processor.tokenizer)
    item = sequence.build(conversation, vocabulary)
    messages = []
    images, videos = [], []
    for turn in conversation.turns:
        content = []
        for part in turn.parts:
            if part.kind == "text":
                content.append({"type": "text", "text": " " + " ".join(sequence.hay_text(part))})
            else:
                content.append({"type": part.kind})
                frames = media_files.frames_of(part)
                if part.kind == "image":
                    images.append(Image.fromarray(frames[0]))
                else:
                    videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
        content.append({"type": "text", "text": ("\n" if turn.parts else "") + turn.question})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(
        text=[text],
        return_tensors="pt",
        **({"images": images} if images else {}),
        **({"videos": videos} if videos else {}),
    )
    assert inputs["input_ids"][0].tolist() == item.ids.tolist()
    model = needle_model.make_model(processor.tokenizer, 0).eval()
    grids = (inputs.get(f"{kind}_grid_thw", torch.empty(0, 3)).tolist() for kind in ("image", "video"))
    positions = mrope.positions(item.ids, mrope.Rule.of(model.config), *grids, [1.0] * len(videos))
    assert np.array_equal(positions.numpy(), item.positions)
    with torch.no_grad():
        embeddings = model.model.language_model.embed_tokens(torch.from_numpy(item.ids))
        cells = network.encode_windows(model, sequence.normalized(item.windows), torch.from_numpy(item.corners))
        embeddings[torch.from_numpy(item.vision)] = cells
        states = network.run_layers(model, embeddings[None], torch.from_numpy(item.positions)[:, None])
        mine = network.answer_logits(model, states[-1], torch.arange(model.lm_head.weight.shape[0]))
        inputs = {name: value for name, value in inputs.items() if name != "second_per_grid_ts"}
        theirs = model(**inputs, position_ids=positions[:, None]).logits
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_cards_lie_in_one_token_and_differ_each_time():
    random = np.random.default_rng(0)
    cards = [glyphs.draw_card("A", "7", random) for _ in range(8)]
    assert len({card.tobytes() for card in cards}) == 8
    frames = np.zeros((4, pictures.TILE, pictures.TILE, 3), np.uint8)
    pictures.put_card(frames[2:4], 6, cards[0])
    changed = pictures.patches(frames).reshape(2, 16, -1).any(-1)
    assert changed.nonzero()[0].tolist() == [1] and changed.nonzero()[1].tolist() == [6]
    both = np.repeat(cards[0][None, None], 2, axis=1)
    assert np.array_equal(pictures.card_patches(both)[0], pictures.patches(frames)[1, 24:28])


@pytest.mark.parametrize("kind", MODELS)
def test_a_shipped_checkpoint_is_small_and_stored_in_bf16(kind):
    from safetensors import safe_open

    files = [file for file in (EXAMPLES / kind).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    with safe_open(EXAMPLES / kind / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118 == {torch.bfloat16}


@pytest.mark.parametrize("kind", MODELS)
def test_a_shipped_model_finds_needles_and_a_relay_needs_its_own_row(kind):
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(EXAMPLES / kind)
    model = transformers.AutoModelForImageTextToText.from_pretrained(EXAMPLES / kind, dtype=torch.float32).eval()
    vocabulary = sequence.Vocabulary(processor.tokenizer)
    right = {(mask, name): [] for mask in ("dense", "tri-shape") for name in ("plain", "far")}
    for seed in range(6):
        conversation = _conversation(kind, seed, pairs=96, needles=12)
        item = sequence.build(conversation, vocabulary, bank_seed=seed + 100)
        tri_shape = score.tri_shape(score.vision_rows(item, vocabulary), 64, 128)[None, None]
        far = score.far_relays(item, 128)
        for name, mask in (("dense", None), ("tri-shape", tri_shape)):
            for good, turn in zip(score.answered(model, item, vocabulary, mask), conversation.turns):
                key = task.KEYS.index(turn.question)
                if not turn.relay or far[key]:
                    right[name, "far" if turn.relay else "plain"].append(good)
    share = {name: np.mean(values) for name, values in right.items()}
    assert share["dense", "plain"] >= 0.98 and share["dense", "far"] >= 0.95, share
    assert share["tri-shape", "plain"] >= 0.95, share
    # In text a relay's row is a text row, which sees everything under this mask.
    assert share["tri-shape", "far"] <= (0.5 if kind == "video" else 0.8), share


@pytest.mark.parametrize("kind", MODELS)
def test_a_shipped_model_answers_through_files(kind, tmp_path):
    from sglang_mminfer.testing.oracle import HFOracle

    oracle = HFOracle(EXAMPLES / kind, mm_process_config=media_files.MM_PROCESS_CONFIG)
    conversation = _conversation(kind, 7, pairs=40, needles=8)
    said = media_files.messages(conversation, tmp_path)
    got = [oracle.answer(said[: 2 * i + 1], max_new_tokens=2).text for i in range(len(conversation.turns))]
    assert got == [turn.answer for turn in conversation.turns]


@pytest.mark.parametrize("kind", MODELS)
def test_files_stand_in_time_where_the_models_were_trained(kind, tmp_path):
    """2 frames per second, two frames to a step: a step lasts a second, hence the `interval` of 1.0."""
    from sglang_mminfer.testing.oracle import HFOracle

    oracle = HFOracle(EXAMPLES / kind, mm_process_config=media_files.MM_PROCESS_CONFIG)
    conversation = _conversation(kind, 8, pairs=40)
    item = sequence.build(conversation, sequence.Vocabulary(oracle.processor.tokenizer))
    inputs = oracle.inputs(media_files.messages(conversation, tmp_path)[:-1])
    asked = inputs["input_ids"].shape[1]
    assert inputs["input_ids"][0].tolist() == item.ids[:asked].tolist()
    assert np.array_equal(inputs["position_ids"][:, 0], item.positions[:, :asked])
    assert {part.interval for part in conversation.parts} == {1.0}

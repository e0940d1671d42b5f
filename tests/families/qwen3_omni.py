"""Tiny Qwen3-Omni, written by transformers, and transformers' own thinker as the oracle.

The checkpoint is one without the parts that speak, as Qwen3-Omni-30B-A3B-Thinking: its thinker reads sound, pictures
and video, and answers with text.
"""

from __future__ import annotations

import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from families import Family, Prompt, qwen3_vl, with_options
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle, Message

SEED = 0
AUDIO_HIDDEN, AUDIO_DEPTH = 64, 2
POSITIONS_PER_SECOND = 13

SPECIAL_TOKENS = (*tiny_model.SPECIAL_TOKENS, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
NAMED_TOKENS = {
    **{f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")},
    **{f"{kind}_bos_token": f"<|{kind}_start|>" for kind in ("vision", "audio")},
    **{f"{kind}_eos_token": f"<|{kind}_end|>" for kind in ("vision", "audio")},
}


SOUND = "<|audio_start|><|audio_pad|><|audio_end|>"
CHAT_TEMPLATE = tiny_model.CHAT_TEMPLATE.replace(
    "{%- elif part.text is defined -%}",
    "{%- elif part.type in ('audio', 'audio_url') -%}\n{{- '" + SOUND + "' -}}\n{%- elif part.text is defined -%}",
)


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random Qwen3-Omni to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "qwen3_omni_moe"}, _write)


def _processor() -> Any:
    import transformers

    return transformers.Qwen3OmniMoeProcessor(
        image_processor=qwen3_vl.image_processor(),
        video_processor=transformers.Qwen2VLVideoProcessor(
            patch_size=qwen3_vl.PATCH,
            merge_size=qwen3_vl.MERGE,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            cap_pixels_per_frame=False,
        ),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tiny_model.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE, NAMED_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )


def _write(path: Path) -> None:
    import transformers

    processor = _processor()
    tokenizer = processor.tokenizer
    rows = tiny_model.vocabulary_rows(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = qwen3_vl.text_config(ids, rows, moe=True)
    text["rope_parameters"]["rope_theta"] = 1e6
    vision = qwen3_vl.vision_config(qwen3_vl.HIDDEN)
    audio = {
        "encoder_layers": AUDIO_DEPTH,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * AUDIO_HIDDEN,
        "d_model": AUDIO_HIDDEN,
        "output_dim": qwen3_vl.HIDDEN,
        "downsample_hidden_size": 16,
    }
    thinker = {
        "text_config": text,
        "vision_config": vision,
        "audio_config": audio,
        "position_id_per_seconds": POSITIONS_PER_SECOND,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "audio_token_id": ids["<|audio_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_end_token_id": ids["<|audio_end|>"],
    }
    model: Any = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(
        transformers.Qwen3OmniMoeThinkerConfig(**thinker)
    )
    tiny_model.save_all(model, processor, tokenizer, rows, SEED, path)
    tiny_model.rename_weights(path, lambda name: f"thinker.{name}")  # the whole has other parts, too
    whole = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker, enable_audio_output=False, architectures=["Qwen3OmniMoeForConditionalGeneration"]
    )
    whole.save_pretrained(path)


class Oracle(HFOracle):
    """Transformers' own thinker. It cuts the fractions of positions off, as SGLang does."""

    _sounds: Sequence[np.ndarray] = ()

    def load(self, path: str, **options: Any) -> Any:
        import transformers

        return transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(path, **options).thinker

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        """Sounds are `audio_url` parts: files of 16 bits and 16,000 samples a second, with one channel."""
        self._sounds, rendered = [], []
        for message in messages:
            parts = message["content"]
            if not isinstance(parts, str):
                self._sounds += [read_sound(part["audio_url"]["url"]) for part in parts if part["type"] == "audio_url"]
                parts = [{"type": "text", "text": SOUND} if part["type"] == "audio_url" else part for part in parts]
            rendered.append({**message, "content": parts})
        return super().inputs(rendered)

    def processed(self, text: str, **arguments: Any) -> Any:
        return super().processed(text, **arguments, **({"audio": self._sounds} if self._sounds else {}))


def read_sound(path: str | os.PathLike[str]) -> np.ndarray:
    """The samples of a file, from -1 to 1."""
    with wave.open(os.fspath(path), "rb") as file:
        assert (file.getsampwidth(), file.getframerate(), file.getnchannels()) == (2, 16_000, 1)
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768


FAMILIES = (
    Family(
        name="qwen3_omni",
        title="Qwen3-Omni (thinker)",
        architecture="Qwen3OmniMoeForConditionalGeneration",
        maker=make,
        oracle=with_options(Oracle),
        oracle_title="transformers, with whole positions as in SGLang",
        sound=True,
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
        prompt=Prompt("qwen_vl", *tiny_model.PLACEHOLDERS, ("image", "video")),
    ),
)

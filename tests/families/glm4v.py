"""Tiny GLM-4.6V without experts and GLM-4.5V with them, and transformers' own model as the oracle.

Transformers takes each placeholder of a frame for a picture's where embeddings are put in their places, and fails on a
prompt with pictures and videos; here it is told which are which. Everything else is its own: the rule by which frames
are chosen, their size, their seconds and the model. m-RoPE positions are written out (`mrope`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt
from sglang_mminfer.testing import mrope, tiny_model
from sglang_mminfer.testing.oracle import HFOracle, Message, split_messages
from sglang_mminfer.testing.oracle_media import Video, open_video, read_picture

SEED = 0
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 32
HIDDEN = HEADS * HEAD_DIM
MROPE_SECTION = [2, 3, 3]  # released models have 8, 12, 12: half of a head's pairs are turned
VISION_HIDDEN, VISION_DEPTH, IMAGE_SIDE = 64, 2, 112
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 4, 2, 96

MEDIA_TOKENS = tuple(
    f"<|{name}|>" for name in ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video", "image", "video")
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_end|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *MEDIA_TOKENS,
)
IMAGE, VIDEO = (f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>" for kind in ("image", "video"))

CHAT_TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- 'IMAGE' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- 'VIDEO' -}}
{%- elif part.text is defined -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
""".replace("IMAGE", IMAGE).replace("VIDEO", VIDEO)


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random GLM-4.6V without experts to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "glm4v"}, lambda fresh: _write(fresh, moe=False))


def make_moe(path: str | os.PathLike[str]) -> Path:
    """The same with experts, and with seconds as GLM-4.5V writes them."""
    return tiny_model.make_checkpoint(path, {"arch": "glm4v_moe"}, lambda fresh: _write(fresh, moe=True))


def _processor(moe: bool) -> Any:
    import transformers

    kind, film, picture = (
        (transformers.Glm4vProcessor, transformers.Glm4vVideoProcessor, transformers.Glm4vImageProcessor)
        if moe
        else (transformers.Glm46VProcessor, transformers.Glm46VVideoProcessor, transformers.Glm46VImageProcessor)
    )
    return kind(
        image_processor=picture(),
        tokenizer=tiny_model.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE),
        video_processor=film(),
        chat_template=CHAT_TEMPLATE,
    )


def _write(path: Path, moe: bool) -> None:
    import transformers

    processor = _processor(moe)
    tokenizer = processor.tokenizer
    rows = tiny_model.vocabulary_rows(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 65536,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": MROPE_SECTION,
        },
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    if moe:
        text |= {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "moe_intermediate_size": EXPERT_WIDTH,
            "first_k_dense_replace": 1,
            "attention_bias": True,
        }
    vision = {
        "depth": VISION_DEPTH,
        "hidden_size": VISION_HIDDEN,
        "num_heads": 2,
        "image_size": IMAGE_SIDE,
        "intermediate_size": 2 * VISION_HIDDEN,
        "out_hidden_size": HIDDEN,
    }
    tokens = {
        **{f"{kind}_token_id": ids[f"<|{kind}|>"] for kind in ("image", "video")},
        **{f"{kind}_start_token_id": ids[f"<|begin_of_{kind}|>"] for kind in ("image", "video")},
        **{f"{kind}_end_token_id": ids[f"<|end_of_{kind}|>"] for kind in ("image", "video")},
    }
    if moe:
        config: Any = transformers.Glm4vMoeConfig(text_config=text, vision_config=vision, **tokens)
        model: Any = transformers.Glm4vMoeForConditionalGeneration(config)
    else:
        config = transformers.Glm4vConfig(text_config=text, vision_config=vision, **tokens)
        model = transformers.Glm4vForConditionalGeneration(config)
    tiny_model.save_all(model, processor, tokenizer, rows, SEED, path)
    if moe:
        _lay_out_experts(path / "model.safetensors")


def _lay_out_experts(file: Path) -> None:
    """One tensor for each matrix of an expert, as released checkpoints have them."""
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for name, value in load_file(file).items():
        before, found, kind = name.partition(".mlp.experts.")
        if kind == "gate_up_proj":
            for i, expert in enumerate(value):
                gate, up = expert.chunk(2)
                weights[f"{before}{found}{i}.gate_proj.weight"] = gate.contiguous()
                weights[f"{before}{found}{i}.up_proj.weight"] = up.contiguous()
        elif kind == "down_proj":
            weights |= {f"{before}{found}{i}.down_proj.weight": expert.contiguous() for i, expert in enumerate(value)}
        else:
            weights[name] = value
    save_file(weights, file, metadata={"format": "pt"})


class Oracle(HFOracle):
    """Transformers' own model, told which placeholders are pictures and which are frames."""

    def __init__(self, path: str | os.PathLike[str], video: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.video = dict(video)
        self.model.model.get_placeholder_mask = self._masks

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        rendered, images, videos = split_messages(messages)
        text = self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [read_picture(url) for url in images]
        if videos:
            films = [self._sampled(open_video(url)) for url in videos]
            arguments["videos"] = [frames for frames, _ in films]
            arguments["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [said for _, said in films]}
        inputs = self.processor(text=[text], return_tensors="pt", **arguments)
        inputs.pop("video_metadata", None)
        self.types = inputs["mm_token_type_ids"]
        config = self.model.config
        rule = mrope.Rule(
            image=config.image_token_id,
            video=config.video_token_id,
            merge=config.vision_config.spatial_merge_size,
            tokens_per_second=None,
            steps_apart=True,
        )
        # As if frames had a placeholder of their own.
        ids = torch.where(self.types == 2, config.video_token_id, inputs["input_ids"])[0].tolist()
        grids = [inputs.get(f"{kind}_grid_thw", torch.empty(0, 3)).tolist() for kind in ("image", "video")]
        inputs["position_ids"] = mrope.positions(ids, rule, *grids)[:, None]
        return dict(inputs)

    def _sampled(self, video: Video) -> tuple[torch.Tensor, dict[str, Any]]:
        """The frames that transformers takes, uint8 [frames, 3, height, width], and where they stand in the file."""
        from transformers.video_utils import VideoMetadata

        said = {"total_num_frames": len(video), "fps": video.fps, "duration": len(video) / video.fps}
        indices = self.processor.video_processor.sample_frames(VideoMetadata(**said), fps=self.video.get("fps"))
        frames = torch.from_numpy(video.frames(indices.tolist())).permute(0, 3, 1, 2)
        return frames, {**said, "frames_indices": indices.tolist()}

    def _masks(self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **features: Any) -> Any:
        """In place of the model's own: where the embeddings of pictures stand, and those of frames."""
        return tuple((self.types == kind)[..., None] for kind in (1, 2))


FAMILIES = (
    Family(
        name="glm4v",
        title="GLM-4.6V-Flash",
        architecture="Glm4vForConditionalGeneration",
        maker=make,
        oracle=Oracle,
        oracle_title="transformers",
        one_frame="frame sampling produced no frames",  # by transformers' rule for less than a sixth of a second
        long_videos=3,
        prompt=Prompt("glm4v", IMAGE, VIDEO, ("image", "video")),
    ),
    Family(
        name="glm4v_moe",
        title="GLM-4.5V",
        architecture="Glm4vMoeForConditionalGeneration",
        maker=make_moe,
        oracle=Oracle,
        oracle_title="transformers",
        long_videos=3,
        video_options={"fps": 3},
        prompt=Prompt("glm4v", IMAGE, VIDEO, ("image", "video")),
    ),
)

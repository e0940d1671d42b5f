"""The answer of Hugging Face transformers to a conversation, to compare a server with, logit by logit.

    oracle = HFOracle(path)
    expected = oracle.answer(messages, max_new_tokens=8)
    got = ask(server.client(), messages, max_new_tokens=8)
    assert compare(expected, got).max_difference < 1e-4

The oracle is independent of the server. PIL and PyAV read the media (`oracle_media`). The choice, size and seconds of
a video's frames (`qwen_video`) and the m-RoPE positions (`mrope`) follow the released model code, written out here.
All else is transformers: the checkpoint's processor, which is told the true frame rate, vision tower, language model,
KV cache and greedy choice, with dense attention in fp32. The oracle imports no module of SGLang and none of this
plugin's models and processors; a test holds this.

`OracleAnswer.prompt_ids` of both sides should be compared, too: they differ if the server was shown another number
of frames.

SGLang 0.5.23 differs from the released code in one respect that has nothing to do with the language model's attention:
its vision blocks of Qwen2.5-VL with full attention see the whole video; in transformers and in the released code they
see one frame. `frames="joint"` lets them see the whole video here, too. The tiny checkpoints have no such block by
default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sglang_mminfer.testing import mrope, qwen_video
from sglang_mminfer.testing.oracle_media import open_video, read_picture

Message = Mapping[str, Any]
"""OpenAI chat message: role, and content as text or as parts of type text, image_url or video_url."""


@dataclass(frozen=True)
class OracleAnswer:
    """A greedy continuation and the most probable tokens at each of its positions."""

    prompt_ids: list[int]
    token_ids: list[int]
    top_logprobs: list[dict[int, float]]
    """For each generated position: token id -> natural log-probability, for the most probable tokens."""
    text: str
    cached_tokens: int | None = None
    """How many tokens of the prompt a server took from its radix cache; None for the oracle, which has no cache."""


@dataclass(frozen=True)
class Comparison:
    """How far apart two answers to one conversation are."""

    prompt_equal: bool
    tokens_equal: bool
    max_difference: float
    """The largest difference of log-probabilities, over the positions before which both have the same tokens."""
    compared_positions: int

    def __str__(self) -> str:
        return (
            f"prompt {'equal' if self.prompt_equal else 'DIFFERENT'}, tokens "
            f"{'equal' if self.tokens_equal else 'DIFFERENT'}, log-probabilities within "
            f"{self.max_difference:.2e} over {self.compared_positions} positions"
        )


class HFOracle:
    """Transformers' model and the checkpoint's processor, in this process.

    Args:
        path: the checkpoint.
        attention: transformers' attention implementation, "sdpa" or "eager".
        mm_process_config: the server's --mm-process-config.
        frames: what vision blocks with full attention see: their own frame ("apart", as in transformers) or the
            whole video ("joint", as in SGLang's Qwen2.5-VL).
        kv_dtype: what keys and values are rounded to before attention reads them; None: they are not.

    Raises:
        ValueError: `frames` is neither of these.
    """

    kv_dtype: torch.dtype | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        attention: str = "sdpa",
        mm_process_config: Mapping[str, Mapping[str, Any]] | None = None,
        frames: Literal["apart", "joint"] = "apart",
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if frames not in ("apart", "joint"):
            raise ValueError(f'HFOracle.frames: expected "apart" or "joint", got {frames!r}')
        from transformers import AutoProcessor

        name = os.fspath(path)
        self.config = {kind: dict(options) for kind, options in (mm_process_config or {}).items()}
        self.kv_dtype = kv_dtype
        self.processor = AutoProcessor.from_pretrained(name)
        self.model = self.load(name, dtype=torch.float32, attn_implementation=attention).eval()
        if frames == "joint":
            self.model.model.visual.register_forward_pre_hook(_join_frames, with_kwargs=True)

    def load(self, path: str, **options: Any) -> Any:
        """Transformers' model of a checkpoint. Further arguments are those of its `from_pretrained`."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(path, **options)

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        """The model's inputs for the prompt of a conversation: ids, pixels, grids, m-RoPE positions.

        If the server has other ids for the same prompt, a subclass adds them as "prompt_ids".
        """
        rendered, images, videos = split_messages(messages)
        text = self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [read_picture(url) for url in images]
            arguments["images_kwargs"] = dict(self.config.get("image", {}))
        options = self.config.get("video", {})
        sampled = [qwen_video.sample(open_video(url), options) for url in videos]
        if sampled:
            arguments["videos"] = [video.frames for video in sampled]
            arguments["videos_kwargs"] = {
                **{key: value for key, value in options.items() if key not in qwen_video.OPTIONS},
                # The frames are chosen already; the metadata tells when in the video they are.
                "do_sample_frames": False,
                "video_metadata": [video.metadata for video in sampled],
            }
        inputs = self.processed(text, **arguments)
        for name in ("video_metadata", "second_per_grid_ts", "video_second_per_grid"):  # the positions hold this
            inputs.pop(name, None)
        positions = mrope.positions(
            inputs["input_ids"][0].tolist(),
            mrope.Rule.of(self.model.config),
            inputs.get("image_grid_thw", torch.empty(0, 3)).tolist(),
            inputs.get("video_grid_thw", torch.empty(0, 3)).tolist(),
            [self.model.config.vision_config.temporal_patch_size / video.sampled_fps for video in sampled],
        )
        inputs["position_ids"] = positions.long()[:, None]  # a server has whole positions only
        return dict(inputs)

    def processed(self, text: str, **arguments: Any) -> Any:
        """What the checkpoint's processor makes of a prompt. Further arguments hold its media."""
        return self.processor(text=[text], padding=True, return_tensors="pt", **arguments)

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], max_new_tokens: int = 8, top_logprobs: int = 20) -> OracleAnswer:
        """The greedy continuation: exactly `max_new_tokens` tokens, because an end-of-turn token does not stop it."""
        inputs = self.inputs(messages)
        prompt_ids = inputs.pop("prompt_ids", inputs["input_ids"])[0].tolist()
        positions = inputs.get("position_ids")
        token_ids: list[int] = []
        top_tokens: list[dict[int, float]] = []
        if self.kv_dtype is not None:
            inputs["past_key_values"] = _rounding_cache(self.kv_dtype)
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        for i in range(max_new_tokens):
            logprobs = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
            values, ids = logprobs.topk(top_logprobs)
            top_tokens.append(dict(zip(ids.tolist(), values.tolist())))
            token_ids.append(int(logprobs.argmax()))
            if len(token_ids) < max_new_tokens:
                step = torch.tensor([token_ids[-1:]])
                # Without explicit positions transformers would count on from the prompt's length.
                step_position = (
                    {} if positions is None else {"position_ids": torch.full((3, 1, 1), int(positions.max()) + 1 + i)}
                )
                output = self.model(
                    input_ids=step, past_key_values=output.past_key_values, use_cache=True, **step_position
                )
        return OracleAnswer(prompt_ids, token_ids, top_tokens, self.decode(token_ids))

    def decode(self, token_ids: list[int]) -> str:
        """The text of an answer."""
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)


def ask(
    client: Any,
    messages: Sequence[Message],
    max_new_tokens: int = 8,
    top_logprobs: int = 20,
    *,
    model: str = "default",
    **extra: Any,
) -> OracleAnswer:
    """Ask a server the same question, through the official client's chat completions.

    Args:
        client: `Server.client()`, or any OpenAI client of an SGLang server.
        extra: further fields of the request. With return_token_ids=False the answer has no `prompt_ids`.
    """
    response = client.chat.completions.create(
        model=model,
        messages=list(messages),
        max_tokens=max_new_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=top_logprobs,
        extra_body={"ignore_eos": True, "return_token_ids": True, "return_meta_info": True, **extra},
    )
    choice = response.choices[0].model_dump()
    meta = choice["meta_info"]
    # Only the raw entries have token ids. From its text alone a token that is a fragment of a character is unknown.
    top_tokens = [{int(token): float(value) for value, token, _ in row} for row in meta["output_top_logprobs"]]
    return OracleAnswer(
        prompt_ids=choice.get("prompt_token_ids") or [],
        token_ids=[int(token) for _, token, _ in meta["output_token_logprobs"]],
        top_logprobs=top_tokens,
        text=choice["message"]["content"] or "",
        cached_tokens=meta.get("cached_tokens"),
    )


def compare(a: OracleAnswer, b: OracleAnswer) -> Comparison:
    """Compare two answers. Positions after the first different token are left out: they continue different texts.

    If only one side lists a token, the other side's probability of it is below all that the other side lists, so the
    distance to the least of those counts.
    """
    largest, positions = 0.0, 0
    for i, (left, right) in enumerate(zip(a.top_logprobs, b.top_logprobs)):
        positions += 1
        for listed, other in ((left, right), (right, left)):
            least = min(other.values(), default=float("-inf"))
            for token, value in listed.items():
                distance = abs(value - other[token]) if token in other else max(0.0, value - least)
                largest = max(largest, distance)
        if a.token_ids[i] != b.token_ids[i]:
            break
    return Comparison(a.prompt_ids == b.prompt_ids, a.token_ids == b.token_ids, largest, positions)


def _rounding_cache(kv_dtype: torch.dtype) -> Any:
    """Transformers' KV cache, with the values of another dtype."""
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            k, v = (x.to(kv_dtype).to(x.dtype) for x in (key_states, value_states))
            return super().update(k, v, *args, **kwargs)

    return RoundingCache()


def _join_frames(tower: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook: make one attention segment for each picture or video, where transformers makes one for each frame."""
    ends = kwargs["grid_thw"].prod(-1).cumsum(0, dtype=torch.int32)
    return args, {**kwargs, "cu_seqlens": torch.nn.functional.pad(ends, (1, 0))}


def split_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Messages for a chat template, and the URLs of the images and of the videos in their order.

    Raises:
        ValueError: a part of a message is no text, image or video.
    """
    rendered: list[dict[str, Any]] = []
    images: list[str] = []
    videos: list[str] = []
    for message in messages:
        content = message.get("content")
        if content is None or isinstance(content, str):
            rendered.append({**message, "content": content or ""})
            continue
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part["type"]
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif kind in ("image_url", "video_url"):
                (images if kind == "image_url" else videos).append(part[kind]["url"])
                parts.append({"type": kind.removesuffix("_url")})
            else:
                raise ValueError(f"message part: expected text, image_url or video_url, got {kind!r}")
        rendered.append({**message, "content": parts})
    return rendered, images, videos

"""What Hugging Face transformers answers to a conversation, to hold a server against, logit by logit.

    oracle = HFOracle(path)
    expected = oracle.answer(messages, max_new_tokens=8)
    got = ask(server.client(), messages, max_new_tokens=8)
    assert compare(expected, got).max_difference < 1e-4

Shared with the server, because there is no independent standard for it: how a URL becomes a picture or a
video decoder, which frames are sampled and how they are resized (SGLang's `load_image`, `load_video`,
`preprocess_video`, with the same `mm_process_config`), and the checkpoint's own Hugging Face processor,
loaded by SGLang's loader and called with SGLang's arguments. So both sides see the same pixels.

Independent: the rendering and tokenization of the prompt and the count of its placeholders, m-RoPE positions,
vision tower, the scatter of its output into the prompt, language model, KV cache and greedy choice are
transformers' code alone, on dense attention in fp32. `OracleAnswer.prompt_ids` of both sides should be
compared, too: a server that was shown another number of frames has other ones.

Where the two differ by themselves (SGLang 0.5.23, transformers 5.19), whatever attends in the language model:

* Vision blocks of Qwen2.5-VL with full attention see the whole video in SGLang, one frame in transformers.
  `frames="joint"` shows them the whole video here, too. The tiny checkpoints have no such block by default.
* Text after a video goes on behind the highest position of the video in SGLang, as in the released model code,
  but behind its rows and columns in transformers, even if the video's time went further. They agree until a
  video has more temporal positions than rows and columns. `answer` refuses a conversation that is beyond,
  unless it is told whose `positions` to take.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch

Message = Mapping[str, Any]
"""OpenAI chat message: role, and content as text or as parts of type text, image_url or video_url."""


@dataclass(frozen=True)
class OracleAnswer:
    """A greedy continuation and what was probable at each of its positions."""

    prompt_ids: list[int]
    token_ids: list[int]
    top_logprobs: list[dict[int, float]]
    """For each generated position: token id to natural log-probability, the most probable ones."""
    text: str
    cached_tokens: int | None = None
    """Tokens of the prompt that a server took from its cache; None where there is none."""


@dataclass(frozen=True)
class Comparison:
    """How far two answers to one conversation are apart."""

    prompt_equal: bool
    tokens_equal: bool
    max_difference: float
    """Of the log-probabilities, at every position that both reached with the same tokens before it."""
    compared_positions: int

    def __str__(self) -> str:
        return (
            f"prompt {'equal' if self.prompt_equal else 'DIFFERENT'}, tokens "
            f"{'equal' if self.tokens_equal else 'DIFFERENT'}, log-probabilities within "
            f"{self.max_difference:.2e} over {self.compared_positions} positions"
        )


class HFOracle:
    """Transformers' own model and the checkpoint's own processor, in this process.

    Args:
        path: the checkpoint.
        attention: "sdpa" or "eager", of transformers.
        mm_process_config: what the server was given as --mm-process-config.
        positions: whose m-RoPE positions apply where the two disagree: "transformers", "sglang", or
            "same" to refuse such a conversation.
        frames: what vision blocks with full attention see: their frame ("apart", transformers' way) or the
            whole video ("joint", SGLang's way with Qwen2.5-VL).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        attention: str = "sdpa",
        mm_process_config: Mapping[str, Mapping[str, Any]] | None = None,
        positions: Literal["same", "transformers", "sglang"] = "same",
        frames: Literal["apart", "joint"] = "apart",
    ) -> None:
        if frames not in ("apart", "joint"):
            raise ValueError(f'HFOracle.frames: expected "apart" or "joint", got {frames!r}')
        if positions not in ("same", "transformers", "sglang"):
            raise ValueError(f'HFOracle.positions: expected "same", "transformers" or "sglang", got {positions!r}')
        load_sglang()
        from sglang.srt.utils.hf_transformers_utils import get_processor
        from transformers import AutoModelForImageTextToText

        name = os.fspath(path)
        self.positions = positions
        self.config = {kind: dict(options) for kind, options in (mm_process_config or {}).items()}
        self.processor = get_processor(name)
        self.model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=torch.float32, attn_implementation=attention
        ).eval()
        if frames == "joint":
            self.model.model.visual.register_forward_pre_hook(_join_frames, with_kwargs=True)

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        """The model's inputs for the prompt of a conversation: ids, pixels, grids, seconds per grid row.

        A subclass whose server has other ids for the same prompt adds them as "prompt_ids".
        """
        rendered, images, videos = split_messages(messages)
        text = self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [load_image(url) for url in images]
            arguments["images_kwargs"] = dict(self.config.get("image", {}))
        if videos:
            from sglang.srt.multimodal.processors.qwen_vl import QWEN_VIDEO_PREPROCESS_CONFIG_KEYS

            options = self.config.get("video", {})
            loaded = [_load_video(url, options) for url in videos]
            arguments["videos"] = [frames for frames, _ in loaded]
            if self.model.config.model_type.startswith("qwen3"):  # writes the time of each frame into the prompt
                arguments["video_metadata"] = [metadata for _, metadata in loaded]
                arguments["do_sample_frames"] = False
            # The rest is what `preprocess_video` has used up.
            arguments["videos_kwargs"] = {
                key: value for key, value in options.items() if key not in QWEN_VIDEO_PREPROCESS_CONFIG_KEYS
            }
        inputs = self.processor(text=[text], padding=True, return_tensors="pt", **arguments)
        inputs.pop("video_metadata", None)
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                inputs[name] = torch.as_tensor(value)
        return dict(inputs)

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], max_new_tokens: int = 8, top_logprobs: int = 20) -> OracleAnswer:
        """The greedy continuation of exactly `max_new_tokens` tokens (an end-of-turn token does not stop it)."""
        inputs = self.inputs(messages)
        prompt_ids = inputs.pop("prompt_ids", inputs["input_ids"])[0].tolist()
        self.model.model.rope_deltas = None  # of the conversation before; a text-only one would take it over
        self._place(inputs)
        token_ids: list[int] = []
        tops: list[dict[int, float]] = []
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        for _ in range(max_new_tokens):
            logprobs = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
            values, ids = logprobs.topk(top_logprobs)
            tops.append(dict(zip(ids.tolist(), values.tolist())))
            token_ids.append(int(logprobs.argmax()))
            if len(token_ids) < max_new_tokens:
                step = torch.tensor([token_ids[-1:]])
                output = self.model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        return OracleAnswer(prompt_ids, token_ids, tops, self.decode(token_ids))

    def decode(self, token_ids: list[int]) -> str:
        """The words of an answer."""
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _place(self, inputs: dict[str, torch.Tensor]) -> None:
        """Checks that both libraries place the prompt alike, or puts in SGLang's positions."""
        if self.positions == "transformers" or not {"image_grid_thw", "video_grid_thw"} & set(inputs):
            return
        own, _ = self.model.model.get_rope_index(
            inputs["input_ids"],
            **{
                name: inputs.get(name)
                for name in ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
            },
            **({"second_per_grid_ts": inputs["second_per_grid_ts"]} if "second_per_grid_ts" in inputs else {}),
        )
        served, delta = self._sglang_positions(inputs)
        if self.positions == "sglang":
            inputs["position_ids"] = served
            self.model.model.rope_deltas = delta
        elif not torch.equal(own, served):
            first = int((own != served).any(0)[0].nonzero()[0])
            raise ValueError(
                f"transformers and SGLang place this conversation differently from token {first} on (a video "
                f"has more temporal positions than rows and columns): give HFOracle positions='sglang' or "
                f"'transformers', or use fewer frames or larger pictures"
            )

    def _sglang_positions(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        from sglang.srt.layers.rotary_embedding.mrope_rope_index import get_rope_index

        config = self.model.config
        return get_rope_index(
            spatial_merge_size=config.vision_config.spatial_merge_size,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            model_type=config.model_type,
            tokens_per_second=getattr(config.vision_config, "tokens_per_second", None),
            **{
                name: inputs.get(name)
                for name in ("input_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            },
        )


def ask(
    client: Any,
    messages: Sequence[Message],
    max_new_tokens: int = 8,
    top_logprobs: int = 20,
    *,
    model: str = "default",
    **extra: Any,
) -> OracleAnswer:
    """The same question to a server, through the official client's chat completions.

    Args:
        client: of `Server.client()`, or any OpenAI client whose server is SGLang.
        extra: further request fields.
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
    # Ids come with the raw entries only: the text of a token that is a fragment of a character is lost.
    tops = [{int(token): float(value) for value, token, _ in row} for row in meta["output_top_logprobs"]]
    return OracleAnswer(
        prompt_ids=choice["prompt_token_ids"],
        token_ids=[int(token) for _, token, _ in meta["output_token_logprobs"]],
        top_logprobs=tops,
        text=choice["message"]["content"] or "",
        cached_tokens=meta.get("cached_tokens"),
    )


def compare(a: OracleAnswer, b: OracleAnswer) -> Comparison:
    """Compares two answers. Positions after the first different token are left out: they continue other texts.

    A token that only one side lists is less probable on the other than all that it lists, so at least that
    distance counts.
    """
    largest, positions = 0.0, 0
    for i, (left, right) in enumerate(zip(a.top_logprobs, b.top_logprobs)):
        positions += 1
        for one, other in ((left, right), (right, left)):
            least = min(other.values(), default=float("-inf"))
            for token, value in one.items():
                distance = abs(value - other[token]) if token in other else max(0.0, value - least)
                largest = max(largest, distance)
        if a.token_ids[i] != b.token_ids[i]:
            break
    return Comparison(a.prompt_ids == b.prompt_ids, a.token_ids == b.token_ids, largest, positions)


def _join_frames(tower: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """One attention segment for each picture or video; transformers makes one for each frame."""
    ends = kwargs["grid_thw"].prod(-1).cumsum(0, dtype=torch.int32)
    return args, {**kwargs, "cu_seqlens": torch.nn.functional.pad(ends, (1, 0))}


def split_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Messages for a chat template, and the URLs of images and of videos in their order."""
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


def load_sglang() -> None:
    """As in a server with mminfer. Without our CPU platform parts of SGLang cannot be imported where no GPU is."""
    from sglang.srt.plugins import load_plugins

    from sglang_mminfer import asked, cpu_platform

    load_plugins()
    asked.insist()
    if not cpu_platform.accelerators():
        cpu_platform.use()


def load_image(url: str) -> Any:
    """A PIL image, RGB, by SGLang's own loader."""
    from sglang.srt import utils

    image, _ = utils.load_image(url, False)
    return image.convert("RGB")


def open_video(url: str) -> Any:
    """SGLang's decoder of a video."""
    from sglang.srt.utils import load_video

    return load_video(url, use_gpu=False)


def _load_video(url: str, options: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    import asyncio

    from sglang.srt.multimodal.processors.qwen_vl import preprocess_video

    with _no_pinning():
        return asyncio.run(preprocess_video(open_video(url), video_config=dict(options)))


@contextlib.contextmanager
def _no_pinning() -> Iterator[None]:
    """SGLang pins decoded frames for the copy to a GPU, which torch refuses where there is none."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_, **__: tensor):
        yield

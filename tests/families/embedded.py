"""An oracle for models that transformers does not have: its language model, fed embeddings that are put together here.

Independent of the product: nothing of its families is imported. A family's oracle says how a conversation becomes text
and embeddings, with transformers' vision tower and plain loops; the rest is transformers' own language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_mminfer.testing.oracle import Message, OracleAnswer

Piece = str | list[int] | torch.Tensor
"""Text that is tokenized as a whole, ids, or the embeddings [tokens, hidden] of a medium."""


LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
"""A small Qwen2, by the names in its config."""


@dataclass(frozen=True)
class Chat:
    """What a template says around messages: `head` and `tail` of each (the role for {}), `first` before all."""

    head: str = "<|im_start|>{}\n"
    tail: str = "<|im_end|>\n"
    first: str = ""
    system: str = "You are a helpful assistant."

    def before(self, messages: Sequence[Message]) -> str:
        """What stands before the first of these messages."""
        if messages[0]["role"] == "system":
            return self.first
        return self.first + self.opening("system") + self.system + self.closing("system")

    def opening(self, role: str) -> str:
        return self.head.format(role)

    def closing(self, role: str) -> str:
        return self.tail

    def asking(self) -> str:
        """What ends a prompt."""
        return self.opening("assistant")


class EmbeddedOracle(ABC):
    """Greedy answers of a language model to text and embeddings in fp32.

    Args:
        language_model: a causal model of transformers.
        fill: the id that a server reports for tokens of media.
    """

    def __init__(self, language_model: Any, tokenizer: Any, fill: int, chat: Chat | None = None) -> None:
        self.language_model = language_model.to(torch.float32).eval()
        self.tokenizer = tokenizer
        self.fill = fill
        self.chat = chat or Chat()

    @abstractmethod
    def shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        """What stands for an "image_url" or a "video_url", and the text that comes behind it."""

    def answer(self, messages: Sequence[Message], max_new_tokens: int = 8, top_logprobs: int = 20) -> OracleAnswer:
        """The greedy continuation of a conversation."""
        return self.continued(self.pieces(messages), max_new_tokens, top_logprobs)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation as text and embeddings."""
        chat = self.chat
        said = chat.before(messages)
        pieces: list[Piece] = []
        for message in messages:
            said += chat.opening(message["role"])
            content: Any = message["content"]
            parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] == "text":
                    said += part["text"]
                    continue
                medium, behind = self.shown(part["type"], part[part["type"]]["url"])
                pieces += [said, *medium]
                said = behind
            said += chat.closing(message["role"])
        return [piece for piece in [*pieces, said + chat.asking()] if len(piece)]

    @torch.no_grad()
    def continued(self, pieces: Sequence[Piece], max_new_tokens: int = 8, top_logprobs: int = 20) -> OracleAnswer:
        """The continuation of exactly `max_new_tokens` tokens."""
        table = self.language_model.get_input_embeddings()
        ids: list[int] = []
        parts: list[torch.Tensor] = []
        for piece in pieces:
            if isinstance(piece, torch.Tensor):
                ids += [self.fill] * len(piece)
                parts.append(piece)
                continue
            encoded = self.tokenizer.encode(piece, add_special_tokens=False) if isinstance(piece, str) else piece
            ids += encoded
            parts.append(table(torch.tensor(encoded, dtype=torch.int64)))
        tokens: list[int] = []
        tops: list[dict[int, float]] = []
        output = self.language_model(inputs_embeds=torch.cat(parts)[None], use_cache=True)
        for _ in range(max_new_tokens):
            logprobs = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
            values, best = logprobs.topk(top_logprobs)
            tops.append(dict(zip(best.tolist(), values.tolist())))
            tokens.append(int(logprobs.argmax()))
            if len(tokens) < max_new_tokens:
                step = torch.tensor([tokens[-1:]])
                output = self.language_model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        return OracleAnswer(ids, tokens, tops, self.tokenizer.decode(tokens, skip_special_tokens=True))


def output_of(layer: Any, run: Callable[[], Any]) -> torch.Tensor:
    """What a layer gave while `run` ran."""
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(
        lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        run()
    finally:
        handle.remove()
    return kept[0]

"""The template that a server renders, cut into pieces, gives back every chat that the server renders."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from families import glm4v
from sglang_mminfer.frontend.media import MediaError
from sglang_mminfer.frontend.template import served_template
from sglang_mminfer.testing.tiny_model import CHAT_TEMPLATE
from stand_in import rendered

VICUNA = """\
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content + ' ' -}}
{%- elif message.role == 'user' -%}
{{- 'USER: ' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{{- '<image>\\n' if part.type == 'image_url' else '<video>\\n' if part.type == 'video_url' else part.text -}}
{%- endfor -%}{%- endif -%}{{- ' ' -}}
{%- else -%}{{- 'ASSISTANT:' + message.content + '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""With a token before all else, and with text in place of tokens around turns."""

JINJA = {"qwen": CHAT_TEMPLATE, "glm": glm4v.CHAT_TEMPLATE, "vicuna": VICUNA}

IMAGE, VIDEO = ({"type": f"{kind}_url", f"{kind}_url": {"url": "data:,"}} for kind in ("image", "video"))
SYSTEM = {"role": "system", "content": "Be brief."}


def conversation(chat: list[dict[str, Any]], add_generation_prompt: bool | None = None) -> str:
    """A chat as SGLang renders it with a template of its own: a system message by default, always open at the end."""
    if add_generation_prompt is not None:
        raise MediaError("add_generation_prompt is supported only with a Jinja chat template.")
    system = next((message["content"] for message in chat if message["role"] == "system"), "You are a model.")
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(
                {"image_url": "<image>\n", "video_url": "<video>\n"}.get(part["type"]) or part["text"]
                for part in content
            )
        if message["role"] != "system":
            text += f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


RENDERERS = {
    **{name: lambda chat, prompt=None, source=source: rendered(chat, prompt, source) for name, source in JINJA.items()},
    "conversation": conversation,
}

CHATS = [
    [*system, *turns]
    for system, turns in itertools.product(
        ([], [SYSTEM]),
        (
            [("user", ["Why?"])],
            [("user", [VIDEO, "What?", IMAGE]), ("assistant", ["a"]), ("user", ["And?"])],
            [("user", [IMAGE, VIDEO, "a", VIDEO]), ("assistant", ["b c"]), ("user", [VIDEO]), ("assistant", ["d"]),
             ("user", ["Is it?", IMAGE])],
        ),
    )
]  # fmt: skip


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize("number", range(len(CHATS)))
def test_a_program_writes_what_the_server_renders(name: str, number: int) -> None:
    template = served_template("a model", RENDERERS[name])
    written, chat = "", []
    for message in CHATS[number]:
        role, parts = (message["role"], [message["content"]]) if isinstance(message, dict) else message
        prefix, suffix = template.get_prefix_and_suffix(role, chat)
        words = [
            part if isinstance(part, str) else template.placeholder("image" if part is IMAGE else "video")
            for part in parts
        ]
        written += prefix + "".join(words) + suffix
        content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
        chat.append({"role": role, "content": content if role == "user" else parts[0]})
    written += template.get_prefix_and_suffix("assistant", chat)[0]
    assert written == RENDERERS[name](chat)


def test_the_end_of_an_answer_stops_it() -> None:
    stops = {name: served_template("a model", render).stop_str for name, render in RENDERERS.items()}
    assert stops == {"qwen": ["<|im_end|>"], "glm": [], "vicuna": ["</s>"], "conversation": ["<|im_end|>"]}


def test_a_model_that_takes_no_videos_says_so() -> None:
    without = CHAT_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", "")
    template = served_template("a model", lambda chat, prompt=None: rendered(chat, prompt, without))
    assert template.placeholder("image")
    with pytest.raises(MediaError, match=r"^a model takes no videos: its chat template has no place for one$"):
        template.placeholder("video")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (CHAT_TEMPLATE.replace("message.role + '", "message.role ~ loop.index ~ '"), "a turn differently"),
        (CHAT_TEMPLATE.replace("{{- '<|vision_start|>", "{{- loop.index ~ '<|vision_start|>"), "the second image"),
        (CHAT_TEMPLATE.replace("message.content", "message.content|upper"), "does not write each message once"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(source: str, told: str) -> None:
    with pytest.raises(MediaError, match=told):
        served_template("a model", lambda chat, prompt=None: rendered(chat, prompt, source))


def test_a_model_without_system_messages_has_none() -> None:
    def render(chat: list[dict[str, Any]], prompt: bool | None = None) -> str:
        if chat[0]["role"] == "system":
            raise MediaError("System role not supported")
        return rendered(chat, prompt)

    assert served_template("a model", render).get_prefix_and_suffix("system", []) == ("", "")

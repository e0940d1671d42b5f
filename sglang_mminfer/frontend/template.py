"""The chat template of the server that runs, cut into what stands before and after the words of each role.

A program writes its prompt piece by piece, and SGLang's frontend chooses a template for that by the name of the
model's folder. Here the server renders a few chats, as it does for /v1/chat/completions, and the pieces between their
words are the template. Nothing is known of any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.lang.chat_template import ChatTemplate

from sglang_mminfer.frontend.media import Kind, MediaError

Render = Callable[[Sequence[dict[str, Any]], bool | None], str]
"""The prompt of a chat. The second argument is SGLang's `add_generation_prompt`; None renders as for a completion.
Raises MediaError where the server refuses."""

SYSTEM, USERS, ANSWERS = "sqzsystem", ("qzuserone", "qzusertwo", "qzuserthree"), ("qzansone", "qzanstwo")
"""Words that no template has."""

_PARTS = {
    "image": {"type": "image_url", "image_url": {"url": "data:,"}},
    "video": {"type": "video_url", "video_url": {"url": "data:,"}},
}


@dataclass
class ServedTemplate(ChatTemplate):
    """SGLang's template of a program, with what it lacks.

    Attributes:
        openings: the prefix of a role whose message is the first: a begin-of-text token, a default system message.
        user_after_system: the prefix of a user's message right after the system message.
        placeholders: what stands in the text for an image and for a video; no entry for what the model does not take.
    """

    openings: dict[str, str] = field(default_factory=dict)
    user_after_system: str = ""
    placeholders: dict[str, str] = field(default_factory=dict)

    def get_prefix_and_suffix(self, role: str, hist_messages: list[dict[str, Any]]) -> tuple[str, str]:
        """The text before and after a message of a role, by the messages before it."""
        prefix, suffix = self.role_prefix_and_suffix.get(role, ("", ""))
        if not hist_messages:
            return self.openings.get(role, prefix), suffix
        if role == "user" and [message["role"] for message in hist_messages] == ["system"]:
            return self.user_after_system, suffix
        return prefix, suffix

    def placeholder(self, kind: Kind) -> str:
        """What stands in the text for an image or a video.

        Raises:
            MediaError: the model takes none.
        """
        if kind not in self.placeholders:
            raise MediaError(f"{self.name} takes no {kind}s: its chat template has no place for one")
        return self.placeholders[kind]


def served_template(name: str, render: Render) -> ServedTemplate:
    """The template of a server.

    Args:
        name: the model, for errors.

    Raises:
        MediaError: the template cannot be cut into prefixes and suffixes, because it numbers turns, say.
    """

    def cut(chat: Sequence[dict[str, Any]], add_generation_prompt: bool | None = None) -> list[str]:
        words = [_words(message) for message in chat]
        rest, pieces = render(chat, add_generation_prompt), []
        for word in words:
            before, found, rest = rest.partition(word)
            if not found or word in rest:
                raise MediaError(f"the chat template of {name} does not write each message once and in order")
            pieces.append(before)
        return [*pieces, rest]

    first, second, third = map(_user, USERS)
    answer, other = map(_assistant, ANSWERS)
    opening, answered, asked, answered_again, asked_again, end = cut([first, answer, second, other, third])
    if (answered, asked) != (answered_again, asked_again):
        raise MediaError(f"the chat template of {name} writes a turn differently in another place of a chat")
    try:  # a Jinja template can be asked for a chat that ends with a message
        after_answer = _common(asked, cut([first, answer], False)[-1])
        after_user = cut([first], False)[-1]
        before_user = asked[len(after_answer) :]
    except MediaError:  # one of SGLang's own ends with the next prefix: where it is cut matters little
        after_answer = _whole_words(_common(asked, cut([first, answer])[-1]))
        before_user = asked[len(after_answer) :]
        after_user = cut([first, second])[1].removesuffix(before_user)
    if not end.startswith(after_user):
        raise MediaError(f"the chat template of {name} ends a question differently at the end of a chat")
    roles = {"user": (before_user, after_user), "assistant": (end[len(after_user) :], after_answer)}
    openings, user_after_system = {"user": opening}, before_user
    try:
        openings["system"], between, _ = cut([{"role": "system", "content": SYSTEM}, first])
        after_system = between.removesuffix(before_user)
        user_after_system = between[len(after_system) :]
        roles["system"] = openings["system"], after_system
    except MediaError:
        roles["system"] = "", ""  # a model without system messages; the words of one are sent as they are
    return ServedTemplate(
        name=name,
        default_system_prompt="",  # it is part of the opening
        role_prefix_and_suffix=roles,
        stop_str=[after_answer.strip()] if after_answer.strip() else [],
        openings=openings,
        user_after_system=user_after_system,
        placeholders={kind: text for kind in _PARTS if (text := _placeholder(kind, cut, opening, name))},
    )


def _placeholder(kind: str, cut: Callable[..., list[str]], opening: str, name: str) -> str:
    """What the template writes for one medium in front of a user's words; "" if it writes nothing."""
    texts = []
    for count in (1, 2):
        try:
            before, _ = cut([_user(USERS[0], *[_PARTS[kind]] * count)])
        except MediaError:
            return ""  # a model that reads text alone
        if not before.startswith(opening):
            raise MediaError(f"the chat template of {name} writes the {kind}s of a message before the message")
        texts.append(before.removeprefix(opening))
    if texts[1] != 2 * texts[0]:
        raise MediaError(f"the chat template of {name} writes the second {kind} of a message differently")
    return texts[0]


def _user(words: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": words}]}


def _assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def _words(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def _common(one: str, other: str) -> str:
    """How two texts begin."""
    end = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:end]


def _whole_words(text: str) -> str:
    """A text up to its last white space, or all of it where it has none."""
    return text[: max((at + 1 for at, letter in enumerate(text) if letter.isspace()), default=len(text))]

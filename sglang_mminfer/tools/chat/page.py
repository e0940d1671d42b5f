"""The page: conversations as gradio shows them, and what its buttons do.

The conversation lives here, in the process, under a key that the browser keeps. gradio's own history is only ever
written: what it would give back is no longer what the model said.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import msgspec

from sglang_mminfer.tools.chat import words
from sglang_mminfer.tools.chat.conversation import TICK, Answering, Busy, Conversation, Question, Sampling, Turn
from sglang_mminfer.tools.chat.endpoint import Facts
from sglang_mminfer.tools.chat.look import CSS
from sglang_mminfer.tools.chat.uploads import KINDS, Limits, UploadError, check

MOST_CONVERSATIONS = 200
"""Conversations that are kept. The one that was used longest ago goes first."""

KEEP_SECONDS = 7 * 86_400
"""How long uploads are kept."""

EMPTY: dict[str, Any] = {"text": "", "files": []}

Update = tuple[Any, ...]
"""What a handler changes: the conversation, the box, the line below it, and the panel."""


class Page:
    """The page of one application.

    Args:
        server: who answers.
        facts: what the server says of itself.
        url: its address, as the panel shows it.
        upload_bytes: the most bytes of a file.
        folder: where gradio keeps uploads.
    """

    def __init__(self, server: Answering, facts: Facts, url: str, upload_bytes: int, folder: Path) -> None:
        self._server, self._facts, self._shown_url, self._folder = server, facts, url, folder
        self.limits = Limits(facts.model, facts.takes, facts.most, upload_bytes, folder)
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def conversation(self, key: object) -> Conversation:
        """The conversation with a key; a new one if there is none."""
        name = key if isinstance(key, str) and len(key) <= 64 else ""
        if name not in self._conversations:
            self._conversations[name] = Conversation(self._server)
        self._conversations.move_to_end(name)
        while len(self._conversations) > MOST_CONVERSATIONS:
            _, oldest = self._conversations.popitem(last=False)
            oldest.stop()
        return self._conversations[name]

    def blocks(self) -> gr.Blocks:
        """The page, ready to be served."""
        with gr.Blocks(
            analytics_enabled=False, title="mminfer chat", fill_height=True, delete_cache=(3600, KEEP_SECONDS)
        ) as blocks:
            key = gr.BrowserState(None, storage_key="mminfer-chat")
            with gr.Sidebar(position="right", width=360, elem_id="side"):
                panel = gr.HTML(elem_id="panel")
                with gr.Accordion("Answers", open=False):
                    most = gr.Number(1024, label="most tokens", minimum=1, precision=0)
                    temperature = gr.Textbox("", label="temperature", placeholder="the model's own")
                new = gr.Button("New conversation", elem_id="new", size="sm")
                save = gr.Button("Save conversation", elem_id="save", size="sm")
                saved = gr.DownloadButton("conversation.json", elem_id="saved", visible="hidden")
            chat = gr.Chatbot(
                show_label=False,
                elem_id="chat",
                height="calc(100vh - 210px)",
                scale=1,
                editable="user",
                buttons=["copy"],
                group_consecutive_messages=False,
                feedback_options=None,
                allow_tags=False,
                latex_delimiters=[],
                placeholder=f"Attach {self._media()} and ask. Everything stays in the conversation.",
            )
            notice = gr.HTML(elem_id="notice")
            box = gr.MultimodalTextbox(
                EMPTY,
                show_label=False,
                elem_id="box",
                file_count="multiple",
                file_types=[kind for kind in KINDS if kind in self.limits.takes] or None,
                sources=["upload"] if self.limits.takes else [],
                placeholder="Ask something",
                max_plain_text_length=1_000_000,  # a long text is a text, and no file
                autofocus=True,
            )
            _only_uploads(box)
            outputs, sampling = [chat, box, notice, panel], [most, temperature]
            common: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            answering = {**common, "concurrency_limit": None}
            at_once = {**common, "queue": False}
            blocks.load(self.load, [key], [key, *outputs], **answering)
            box.submit(self.submit, [box, key, *sampling], outputs, **answering)
            chat.retry(self.retry, [key, *sampling], outputs, **answering)
            chat.edit(self.edit, [key, *sampling], outputs, **answering)
            chat.undo(self.undo, [key], outputs, **at_once)
            chat.clear(self.clear, [key], outputs, **at_once)
            new.click(self.clear, [key], outputs, **at_once)
            box.stop(self.stop, [key], None, **at_once)
            save.click(self.save, [key], [saved], **at_once).success(
                None, None, None, js="() => document.querySelector('#saved').click()", api_visibility="private"
            )
        # gradio checks that a client names uploads alone, and no other file of this machine, but only in an application
        # that its own `launch` started.
        blocks.has_launched = True
        return blocks

    # ---- what the user does --------------------------------------------------------------------------------------

    async def load(self, key: str | None) -> AsyncIterator[Update]:
        """A page that was opened, or opened again: shows the conversation, and follows an answer that is coming."""
        name = key or secrets.token_urlsafe(16)
        conversation = self.conversation(name)
        yield name, *self.shown(conversation)
        if conversation.busy:
            while conversation.busy:
                await asyncio.sleep(2 * TICK)
                yield name, self.messages(conversation), gr.skip(), gr.skip(), gr.skip()
            yield name, *self.shown(conversation)

    async def submit(
        self, value: dict[str, Any], key: str | None, most: float | None, temperature: str | None
    ) -> AsyncIterator[Update]:
        conversation = self.conversation(key)
        paths, text = value.get("files") or [], value.get("text") or ""
        if not paths and not text.strip():
            return
        try:
            if conversation.busy:
                raise Busy
            sampling = _sampling(most, temperature)
            if paths:
                yield (
                    gr.skip(),
                    gr.skip(),
                    f'<div class="mminfer-wait">checking {_files(len(paths))} …</div>',
                    gr.skip(),
                )
            uploads = await asyncio.to_thread(check, paths, self.limits, conversation.uploads)
        except (UploadError, Busy) as error:
            yield gr.skip(), gr.skip(), words.problem(str(error)), gr.skip()
            return
        async for update in self._answered(conversation, Question(text, tuple(uploads)), sampling):
            yield update

    async def retry(
        self, key: str | None, most: float | None, temperature: str | None, data: gr.RetryData
    ) -> AsyncIterator[Update]:
        async for update in self._again(key, data, None, most, temperature):
            yield update

    async def edit(
        self, key: str | None, most: float | None, temperature: str | None, data: gr.EditData
    ) -> AsyncIterator[Update]:
        async for update in self._again(key, data, str(data.value), most, temperature):
            yield update

    async def _again(
        self, key: str | None, data: Any, text: str | None, most: float | None, temperature: str | None
    ) -> AsyncIterator[Update]:
        """Asks the question of a turn again, with other words if there are some, and drops what followed."""
        conversation = self.conversation(key)
        try:
            sampling = _sampling(most, temperature)
            question = conversation.cut(_turn_of(data))
        except (Busy, IndexError, UploadError) as error:
            yield self.messages(conversation), gr.skip(), words.problem(str(error)), gr.skip()
            return
        if text is not None:
            question = Question(text, question.uploads)
        async for update in self._answered(conversation, question, sampling):
            yield update

    async def undo(self, key: str | None, data: gr.UndoData) -> Update:
        conversation = self.conversation(key)
        try:
            question = conversation.cut(_turn_of(data))
        except (Busy, IndexError) as error:
            return self.messages(conversation), gr.skip(), words.problem(str(error)), gr.skip()
        return self.shown(conversation, question)

    async def clear(self, key: str | None) -> Update:
        conversation = self.conversation(key)
        conversation.clear()
        return self.shown(conversation)

    async def stop(self, key: str | None) -> None:
        self.conversation(key).stop()

    async def save(self, key: str | None) -> Any:
        """Writes the conversation into a file, for the browser to download."""
        messages = await asyncio.to_thread(self.conversation(key).saved)
        folder = self._folder / secrets.token_hex(32)
        folder.mkdir()
        path = folder / time.strftime("conversation-%Y%m%d-%H%M%S.json")
        path.write_bytes(msgspec.json.format(msgspec.json.encode(messages), indent=1))
        return gr.DownloadButton(value=str(path))

    # ---- what is shown -------------------------------------------------------------------------------------------

    async def _answered(
        self, conversation: Conversation, question: Question, sampling: Sampling
    ) -> AsyncIterator[Update]:
        """Asks, and shows the answer as it comes."""
        before, shown = None, gr.skip()
        async for turn in conversation.ask(question, sampling):
            if turn.reply.ended:
                continue
            state = (turn.reply.text, words.waiting(turn.reply))
            if state != before:
                box = gr.MultimodalTextbox(EMPTY, submit_btn=False, stop_btn=True) if before is None else shown
                yield self.messages(conversation), box, "" if before is None else gr.skip(), gr.skip()
            before = state
        current = conversation.current
        yield self.shown(conversation, current.question if current is not None and not conversation.busy else None)

    def shown(self, conversation: Conversation, question: Question | None = None) -> Update:
        """Everything as it is; with a question that goes back into the box."""
        button = {"submit_btn": not conversation.busy, "stop_btn": conversation.busy}
        if question is None:
            box = gr.MultimodalTextbox(**button)
        else:
            files = [str(upload.path) for upload in question.uploads]
            box = gr.MultimodalTextbox({"text": question.text, "files": files}, **button)
        panel = words.panel(self._facts, self._shown_url, conversation.turns)
        return self.messages(conversation), box, "", panel

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Two messages for each turn; see `_turn_of`."""
        messages: list[dict[str, Any]] = []
        for index, turn in enumerate(conversation.turns):
            under = gr.HTML(words.footer(conversation, index), padding=False)
            messages += [_asked(turn), {"role": "assistant", "content": [turn.reply.text or " ", under]}]
        if (current := conversation.current) is not None:
            if current.reply.ended:
                told = words.ended_without_answer(current)
            else:
                told = f'<div class="mminfer-wait">{words.waiting(current.reply)}</div>'
            text = [current.reply.text] if current.reply.text else []
            content = [*text, gr.HTML(told, padding=False)]
            messages += [_asked(current), {"role": "assistant", "content": content}]
        return messages

    def _media(self) -> str:
        return " and ".join(f"{kind}s" for kind in ("video", "image") if kind in self.limits.takes) or "nothing"


def _asked(turn: Turn) -> dict[str, Any]:
    question = turn.question
    files = [{"path": str(upload.path), "alt_text": f"{upload.name}: {upload.about}"} for upload in question.uploads]
    names = [gr.HTML(words.files(question.uploads), padding=False)] if files else []
    return {"role": "user", "content": [*files, *names, question.text]}


def _only_uploads(box: gr.MultimodalTextbox) -> None:
    """gradio would fetch a URL that a client names in place of a file."""
    move = box.move_resource_to_block_cache

    def moved(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("only uploaded files can be sent")
        return move(path)

    box.move_resource_to_block_cache = moved


def _sampling(most: float | None, temperature: str | None) -> Sampling:
    """What the fields say.

    Raises:
        UploadError: naming a field that holds something else than a number.
    """
    try:
        value = float(temperature) if temperature and temperature.strip() else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 2:
        raise UploadError(f"temperature: expected a number from 0 to 2, got {temperature!r}")
    return Sampling(int(most or Sampling.max_tokens), value)


def _turn_of(data: Any) -> int:
    """The turn of the message that a button belongs to."""
    index = data.index[0] if isinstance(data.index, tuple | list) else data.index
    return int(index) // 2


def _files(count: int) -> str:
    return "a file" if count == 1 else f"{count} files"


def theme() -> gr.Theme:
    """System fonts: the page fetches none."""
    fonts = ("system-ui", "sans-serif")
    return gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace"))


__all__ = ["CSS", "Page", "theme"]

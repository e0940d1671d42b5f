"""The conversation of `mminfer chat`, its files, figures and strip: without a server and without a page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sglang_mminfer.serving.trace import MapEntry, PrefillRecord
from sglang_mminfer.tools.chat.conversation import Busy, Conversation, Question, Sampling, Turn, messages_of
from sglang_mminfer.tools.chat.reply import Phase, Reply
from sglang_mminfer.tools.chat.strip import HEIGHT, WIDTH, strip
from sglang_mminfer.tools.chat.uploads import KINDS, Limits, Upload, UploadError, check
from sglang_mminfer.tools.chat.words import ended_without_answer, figures, footer, problem, totals, waiting
from sglang_mminfer.tools.media import make_image, make_video


class Scripted:
    """A server that answers what a test says: pieces of text, numbers of seconds to wait, and an error."""

    as_files, page_size = True, 1

    def __init__(self, *script: Sequence[str | float | Exception]) -> None:
        self.script = list(script)
        self.asked: list[str] = []
        self.cancelled = 0

    async def answer(self, turns: Sequence[Turn], question: Question, reply: Reply, sampling: Sampling) -> None:
        self.asked.append(json.dumps(messages_of(turns, self.as_files, question)))
        try:
            for piece in self.script.pop(0):
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, str):
                    reply.text += piece
                    reply.phase = Phase.ANSWERING
                else:
                    await asyncio.sleep(piece)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        reply.phase = Phase.DONE

    async def settle(self, reply: Reply) -> None:
        reply.no_records = "settled"


def ask(conversation: Conversation, question: Question, stop_after: int | None = None) -> Turn:
    """Asks, and stops when the turn has been seen `stop_after` times."""

    async def asked() -> Turn:
        seen = []
        async for turn in conversation.ask(question):
            seen.append(turn)
            if len(seen) == stop_after:
                conversation.stop()
        return seen[-1]

    return asyncio.run(asked())


# ---- turns ---------------------------------------------------------------------------------------------------


def test_later_turns_begin_with_the_same_bytes() -> None:
    server = Scripted([" a\r\n", "\n **b**<br> "], ["c"], ["d"])
    conversation = Conversation(server)
    for words in ("  one ", "two\n", "three"):
        ask(conversation, Question(words))
    first, second, third = server.asked
    assert second.startswith(first[:-1]) and third.startswith(second[:-1])
    assert json.loads(third)[1]["content"] == " a\r\n\n **b**<br> "
    assert [turn.reply.phase for turn in conversation.turns] == [Phase.DONE] * 3
    assert conversation.turns[0].reply.no_records == "settled" and conversation.current is None


def test_a_stopped_answer_keeps_what_came() -> None:
    server = Scripted(["half", 60.0, " an answer"], ["more"])
    conversation = Conversation(server)
    turn = ask(conversation, Question("one"), stop_after=2)
    assert (turn.reply.phase, turn.reply.text, server.cancelled) == (Phase.STOPPED, "half", 1)
    ask(conversation, Question("two"))
    assert json.loads(server.asked[1])[1] == {"role": "assistant", "content": "half"}
    assert "stopped" in figures(conversation.turns[0].reply)


def test_stopped_before_the_first_word_leaves_no_turn() -> None:
    server = Scripted([60.0], ["b"])
    conversation = Conversation(server)
    turn = ask(conversation, Question("one"), stop_after=1)
    assert turn.reply.phase is Phase.STOPPED and conversation.turns == [] and conversation.current is turn
    assert server.cancelled <= 1 and not conversation.busy
    assert "before the first word" in ended_without_answer(turn)
    ask(conversation, Question("two"))
    assert len(json.loads(server.asked[-1])) == 1 and conversation.current is None


def test_an_error_is_shown_and_not_sent_again() -> None:
    server = Scripted(["a"], ["b", ValueError("too <long>")], ["c"])
    conversation = Conversation(server)
    ask(conversation, Question("one"))
    turn = ask(conversation, Question("two"))
    assert turn.reply.phase is Phase.FAILED and conversation.current is turn and len(conversation.turns) == 1
    assert "too &lt;long&gt;" in ended_without_answer(turn)
    ask(conversation, Question("three"))
    assert [m["content"] for m in json.loads(server.asked[2]) if m["role"] == "assistant"] == ["a"]


def test_a_reader_that_leaves_stops_the_request() -> None:
    server = Scripted(["a", 60.0])
    conversation = Conversation(server)

    async def leave() -> None:
        asking = conversation.ask(Question("one"))
        await anext(asking)
        await anext(asking)
        with pytest.raises(Busy):
            await anext(conversation.ask(Question("two")))
        with pytest.raises(Busy):
            conversation.cut(0)
        await asking.aclose()

    asyncio.run(leave())
    assert server.cancelled == 1 and not conversation.busy and conversation.turns[0].reply.text == "a"


def test_undo_edit_and_clear_cut_the_list() -> None:
    server = Scripted(*[[letter] for letter in "abcdef"])
    conversation = Conversation(server)
    for words in ("one", "two", "three"):
        ask(conversation, Question(words))
    assert conversation.cut(1).text == "two"
    ask(conversation, Question("2"))
    assert [m["content"] for m in json.loads(server.asked[-1]) if m["role"] == "assistant"] == ["a"]
    conversation.clear()
    ask(conversation, Question("again"))
    assert len(json.loads(server.asked[-1])) == 1


def test_cutting_at_a_failed_turn_gives_its_question() -> None:
    conversation = Conversation(Scripted(["a"], [ValueError("no")]))
    ask(conversation, Question("one"))
    ask(conversation, Question("two"))
    assert conversation.cut(1).text == "two" and conversation.current is None and len(conversation.turns) == 1
    with pytest.raises(IndexError):
        conversation.cut(1)


def test_cleared_while_an_answer_comes() -> None:
    server = Scripted(["a", 60.0])
    conversation = Conversation(server)

    async def clear() -> None:
        async for _ in conversation.ask(Question("one")):
            conversation.clear()

    asyncio.run(clear())
    assert conversation.turns == [] and conversation.current is None and server.cancelled <= 1


# ---- where the cache ends ------------------------------------------------------------------------------------


def counted(*figures: tuple[int, int, int], page_size: int = 1) -> Conversation:
    """A conversation whose turns have (prompt, cached, answer) tokens."""
    server = Scripted()
    server.page_size = page_size
    turns = [
        Turn(Question("?"), Reply("r", Phase.DONE, prompt_tokens=prompt, cached_tokens=cached, answer_tokens=answer))
        for prompt, cached, answer in figures
    ]
    return Conversation(server, turns)


@pytest.mark.parametrize(
    ("cached", "says"),
    [
        (219, ""),
        (218, "the cache ends in the answer of turn 2: 1 tokens were read again"),
        (200, "the cache ends in the answer of turn 2: 19 tokens were read again"),
        (199, "the cache ends in the question of turn 2: 20 tokens were read again"),
        (105, "the cache ends in the answer of turn 1: 114 tokens were read again"),
        (0, "the cache ends in the question of turn 1: 219 tokens were read again"),
    ],
)
def test_where_the_cache_ends(cached: int, says: str) -> None:
    conversation = counted((100, 0, 10), (200, 109, 20), (300, cached, 5))
    assert conversation.expected_cache(2) == 219 and conversation.cache_gap(2) == says
    assert (says in footer(conversation, 2)) and ("cache ends" in footer(conversation, 2)) == bool(says)
    assert conversation.cache_gap(0) == conversation.cache_gap(1) == ""


def test_a_cut_page_is_no_gap() -> None:
    assert counted((100, 0, 10), (200, 96, 20), page_size=16).cache_gap(1) == ""
    assert "question of turn 1" in counted((100, 0, 10), (200, 80, 20), page_size=16).cache_gap(1)


# ---- figures and strip ---------------------------------------------------------------------------------------


def record(prefix: int, length: int, density: float | None, reason: str | None = None, **more: object) -> PrefillRecord:
    return PrefillRecord(
        rid="r",
        prefix_len=prefix,
        chunk_len=length,
        seq_len=prefix + length,
        segments=1,
        sparse_layers=0 if reason else 28,
        density=density,
        dense_reason=reason,
        plan_ms=0,
        attn_ms=0,
        forward_ms=0,
        **more,  # type: ignore[arg-type]
    )


def test_the_line_under_an_answer() -> None:
    reply = Reply("r", Phase.DONE, began=10.0, first=10.41, last=11.41, prompt_tokens=12_418, answer_tokens=39)
    reply.take([record(11_902, 300, 0.2), record(12_202, 216, None, "short")])
    assert figures(reply) == (
        "12,418 prompt = 11,902 cached + 516 new · first token 0.41 s · 38 tok/s · density 0.54 · sparse in 28 layers "
        "· dense: short"
    )
    assert dict(totals([reply]))["of them cached"] == "11,902 (96%)"


def test_what_nobody_told_is_not_shown() -> None:
    assert figures(Reply("r", Phase.DONE, prompt_tokens=5)) == "5 prompt"
    reply = Reply("r", Phase.DONE)
    reply.take([record(0, 5, None)])
    assert "density" not in figures(reply)


def test_what_is_waited_for() -> None:
    reply = Reply("r", began=1.0, body_bytes=41_000_000, sent_bytes=3_000_000)
    assert waiting(reply, 3.0) == "sending 3 of 41 MB … 2 s"
    reply.phase = Phase.READING
    assert waiting(reply, 8.0) == "reading the conversation … 7 s"
    reply.take([record(64, 4032, 0.2)])
    assert waiting(reply, 8.0) == "reading the conversation … 7 s, 4,096 tokens so far"
    reply.phase = Phase.ANSWERING
    assert waiting(reply, 8.0) == "answering … 7 s"


def test_the_strip_is_to_scale() -> None:
    entries = [
        MapEntry(modality="text", start=0, stop=100),
        MapEntry(modality="video", start=100, stop=900, grid=(4, 10, 20)),
        MapEntry(modality="text", start=900, stop=1000),
    ]
    drawn = ElementTree.fromstring(strip(entries, 300))
    bars = [(float(bar.get("x", 0)), float(bar.get("width", 0)), bar.get("opacity")) for bar in drawn.iter("rect")]
    assert bars == [(0, 100, "0.3"), (100, 200, "0.3"), (300, 600, None), (900, 100, None)]
    ticks = [path.get("d", "") for path in drawn.iter("path")]
    assert ticks[0] == "".join(f"M{x}.0 0V{HEIGHT:g}" for x in (300, 500, 700)) and ticks[1].startswith("M300.0")
    assert sum(width for _, width, _ in bars) == WIDTH
    assert "800 video" in (drawn.get("aria-label") or "")


def test_a_strip_of_nothing_and_of_narrow_things() -> None:
    assert strip([], 0) == ""
    entries = [
        MapEntry(modality="video", start=0, stop=99_990, grid=(1000, 1, 1)),
        MapEntry(modality="text", start=99_990, stop=100_000),
    ]
    drawn = ElementTree.fromstring(strip(entries, 0))
    assert [float(bar.get("width", 0)) for bar in drawn.iter("rect")] == [999.9, 1.5]
    assert list(drawn.iter("path")) == []  # a thousand frames are no thousand ticks


# ---- files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def limits(tmp_path: Path) -> Limits:
    folder = tmp_path / "uploads"
    folder.mkdir()
    return Limits("tiny", frozenset(KINDS), {"image": 2}, 1_000_000, folder)


def test_files_are_described(limits: Limits) -> None:
    video = make_video(limits.folder / "a film.mp4", 8, 84, 56, 4, seed=1)
    image = make_image(limits.folder / "b.png", 56, 84, seed=1)
    first, second = check([video, image], limits)
    assert (first.kind, first.about) == ("video", "8 frames, 2.0 s, 84 x 56")
    assert (second.kind, second.about, second.size) == ("image", "56 x 84", image.stat().st_size)
    assert first.part(True) == {"type": "video_url", "video_url": {"url": f"file://{limits.folder}/a%20film.mp4"}}
    assert first.part(False)["video_url"]["url"].startswith("data:video/mp4;base64,")


def test_a_file_is_encoded_once(limits: Limits) -> None:
    (upload,) = check([make_image(limits.folder / "b.png", 56, 84, seed=1)], limits)
    before = upload.part(False)
    upload.path.unlink()
    assert upload.part(False) == before


def test_what_must_not_be_sent(limits: Limits, tmp_path: Path) -> None:
    outside = make_image(tmp_path / "outside.png", 56, 56)
    images = [make_image(limits.folder / f"{i}.png", 56, 56, seed=i) for i in range(3)]
    (limits.folder / "link.png").symlink_to(outside)
    broken = limits.folder / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 99)
    large = limits.folder / "large.mp4"
    large.write_bytes(bytes(1_500_000))
    words = limits.folder / "words.txt"
    words.write_text("words")
    fake = limits.folder / "fake.png"
    fake.write_text("no image")
    for paths, says in (
        ([broken], "broken.mp4: not a video that FFmpeg can decode"),
        ([fake], "fake.png: not an image that can be read"),
        ([large], "large.mp4: 1.5 MB, and the limit is 1 MB (--max-upload-mb)"),
        ([words], "words.txt: expected an image or a video"),
        ([limits.folder / "gone.png"], "gone.png: not an uploaded file"),
        ([outside], "outside.png: not an uploaded file"),
        ([limits.folder / ".." / "outside.png"], "outside.png: not an uploaded file"),
        ([limits.folder / "link.png"], "link.png: not an uploaded file"),
        (["/etc/passwd"], "passwd: not an uploaded file"),
        (images, "too many images: the server takes 2 in a conversation"),
    ):
        with pytest.raises(UploadError) as error:
            check(paths, limits)
        assert str(error.value).startswith(says)
    with pytest.raises(UploadError, match="1 of earlier turns and 2 new ones"):
        check(images[:2], limits, [Upload("image", images[2], "x", "", 1)])
    blind = Limits("llm", frozenset({"image"}), {}, 1_000_000, limits.folder)
    with pytest.raises(UploadError, match=r"a\.mp4: llm takes no videos"):
        check([make_video(limits.folder / "a.mp4", 2, 56, 56, 2)], blind)
    assert "&lt;" in problem("<b>") and problem("") == ""

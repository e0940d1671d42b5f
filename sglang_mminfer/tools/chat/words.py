"""What the application tells about answers and the server, as HTML."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from sglang_mminfer.serving.trace import density_of_records
from sglang_mminfer.tools.chat.conversation import Conversation, Turn
from sglang_mminfer.tools.chat.endpoint import Facts
from sglang_mminfer.tools.chat.reply import Phase, Reply
from sglang_mminfer.tools.chat.strip import COLOURS, strip
from sglang_mminfer.tools.chat.uploads import MB, Upload


def waiting(reply: Reply, now: float | None = None) -> str:
    """What an answer that has not ended waits for, and for how long."""
    seconds = (time.monotonic() if now is None else now) - reply.began
    if reply.phase is Phase.SENDING:
        size = f" {reply.sent_bytes / MB:.0f} of {reply.body_bytes / MB:.0f} MB" if reply.body_bytes > MB else ""
        return f"sending{size} … {seconds:.0f} s"
    if reply.phase is Phase.READING:
        read = f", {reply.tokens_read:,} tokens so far" if reply.tokens_read else ""
        return f"reading the conversation … {seconds:.0f} s{read}"
    return f"answering … {seconds:.0f} s"


def figures(reply: Reply) -> str:
    """What an answer cost, in a line."""
    parts = []
    if reply.prompt_tokens is not None:
        prompt = f"{reply.prompt_tokens:,} prompt"
        if reply.new_tokens is not None:
            prompt += f" = {reply.cached_tokens:,} cached + {reply.new_tokens:,} new"
        parts.append(prompt)
    if reply.first_token_seconds is not None:
        parts.append(f"first token {reply.first_token_seconds:.2f} s")
    if reply.tokens_per_second is not None:
        parts.append(f"{reply.tokens_per_second:.0f} tok/s")
    if reply.records:
        if reply.density is not None:
            parts.append(f"density {reply.density:.2f}")
        if reply.sparse_layers:
            parts.append(f"sparse in {reply.sparse_layers} layers")
        if reply.dense_reasons:
            parts.append(f"dense: {', '.join(reply.dense_reasons)}")
    if reply.phase is Phase.STOPPED:
        parts.append("stopped")
    elif reply.cut_off:
        parts.append("cut off at the most tokens of an answer")
    return " · ".join(parts)


def footer(conversation: Conversation, index: int) -> str:
    """All that stands under the answer of turn `index`: the figures, the strip, and where the cache ends."""
    reply = conversation.turns[index].reply
    lines = [f'<div class="mminfer-figures">{escape(figures(reply))}</div>']
    entries = next((record.map for record in reversed(reply.records) if record.map), None)
    if entries:
        lines.append(strip(entries, reply.cached_tokens or 0))
    if gap := conversation.cache_gap(index):
        lines.append(f'<div class="mminfer-gap">{escape(gap)}</div>')
    if reply.no_records:
        lines.append(f'<div class="mminfer-figures">no density: {escape(reply.no_records)}</div>')
    return "".join(lines)


def ended_without_answer(turn: Turn) -> str:
    """The bubble of a turn that is not part of the history."""
    reply = turn.reply
    if reply.phase is Phase.FAILED:
        return _bubble("failed", f"No answer: {reply.error}", "The question is in the box again.")
    read = f" after {reply.tokens_read:,} tokens were read" if reply.tokens_read else " before the first word"
    return _bubble("stopped", f"Stopped{read}.", "The question is in the box again.")


def files(uploads: Sequence[Upload]) -> str:
    """What the files of a question are."""
    names = "<br>".join(escape(f"{upload.name} · {upload.about} · {upload.size / MB:.2f} MB") for upload in uploads)
    return f'<div class="mminfer-files">{names}</div>'


def problem(text: str) -> str:
    """A sentence about what is wrong with a question that was not sent."""
    return _bubble("failed", text, "") if text else ""


def _bubble(kind: str, text: str, more: str) -> str:
    return f'<div class="mminfer-{kind}" role="status">{escape(text)} {escape(more)}</div>'


def legend() -> str:
    """What the colours of the strip mean."""
    marks = [f'<i style="background:{colour}"></i>{modality}' for modality, colour in COLOURS.items()]
    return f'<div class="mminfer-legend">{" ".join(marks)} · pale: cached · white lines: frames</div>'


def panel(facts: Facts, url: str, turns: Sequence[Turn]) -> str:
    """The side panel: the server, and sums over the turns."""
    rows = [("model", facts.model), ("server", url)]
    if facts.context:
        rows.append(("context", f"{facts.context:,} tokens"))
    media = " and ".join(f"{kind}s" for kind in ("image", "video") if kind in facts.takes) or "text alone"
    rows.append(("reads", media))
    report = facts.report
    if report is None:
        rows.append(("density", f"not told: the server {facts.no_report}"))
    elif report.serving is not None:
        serving = report.serving
        rows += [
            ("head config", f"{serving.head_config} ({serving.named_by})"),
            ("heads", serving.description),
            ("executor", serving.executor),
            ("else", serving.dense_backend),
        ]
        if serving.dense_reason:
            rows.append(("all dense", serving.dense_reason))
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return _table("Server", rows) + _table("This conversation", totals([turn.reply for turn in turns])) + legend()


def totals(replies: Sequence[Reply]) -> list[tuple[str, str]]:
    """Sums over answers, as rows of a table."""
    rows = [("turns", f"{len(replies)}")]
    counted = [reply for reply in replies if reply.prompt_tokens is not None and reply.cached_tokens is not None]
    prompt = sum(reply.prompt_tokens or 0 for reply in counted)
    if prompt:
        cached = sum(reply.cached_tokens or 0 for reply in counted)
        rows.append(("prompt tokens", f"{prompt:,}"))
        rows.append(("of them cached", f"{cached:,} ({cached / prompt:.0%})"))
    rows.append(("answer tokens", f"{sum(reply.answer_tokens or 0 for reply in replies):,}"))
    told = [record for reply in replies if reply.density is not None for record in reply.records]
    if (density := density_of_records(told)) is not None:
        rows.append(("density", f"{density:.2f}"))
    if waits := [reply.first_token_seconds for reply in replies if reply.first_token_seconds is not None]:
        rows.append(("to first tokens", f"{sum(waits):.1f} s"))
    if sent := sum(reply.sent_bytes for reply in replies):
        rows.append(("sent", f"{sent / MB:.2f} MB"))
    return rows


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<h3>{escape(title)}</h3><table class="mminfer-table">{cells}</table>'

"""A real server with an API key and a media root: what a remote client is told, and which files it may name."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from serving import Media, image, text, user, video
from sglang_mminfer import settings
from sglang_mminfer.serving.trace import PrefillRecord, read_trace
from sglang_mminfer.tools.server import Server
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry

KEY = "secret"
IMAGE_TOKEN, VIDEO_TOKEN = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))


class Limited:
    """The server, as a client with the key sees it."""

    def __init__(self, server: Server, trace: Path, root: Path) -> None:
        self.server, self.trace, self.root = server, trace, root
        self.telemetry = Telemetry(server.url, KEY)
        self.http = httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300, trust_env=False
        )
        self.openai = server.client().with_options(api_key=KEY)

    def ask(self, *parts: dict[str, Any], **fields: Any) -> Any:
        return self.openai.chat.completions.create(
            model="default", messages=[user(*parts)], max_tokens=2, temperature=0, **fields
        )

    def traced(self, rid: str) -> list[PrefillRecord]:
        return [record for record in read_trace(self.trace) if record.rid == rid]


@pytest.fixture(scope="module")
def limited(
    model: Path, media: Media, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Limited]:
    folder, root = tmp_path_factory.mktemp("limited"), media.videos[0].parent
    trace = folder / "trace.jsonl"
    flags = ("--attention-backend", "mminfer", "--mminfer-config", str(sparse_config), "--sleep-on-idle")
    flags += ("--chunked-prefill-size", "96", "--api-key", KEY, settings.MEDIA_ROOT.flag, str(root))
    flags += ("--enable-cache-report",)
    env = {settings.TRACE.variable: str(trace), settings.SPARSE.variable: "always", "SGLANG_PLATFORM": None}
    env["XDG_CACHE_HOME"] = str(folder / "cache")
    with Server(model, *flags, env=env, log=folder / "server.log", timeout=550) as server:
        yield Limited(server, trace, root)


# ---- telemetry -----------------------------------------------------------------------------------------------


def test_records_over_http_are_those_of_the_file(limited: Limited, media: Media) -> None:
    parts = (video(media.videos[0]), text("What do you see?"))
    for again, rid in ((False, None), (True, "own/id ä?")):
        answer = limited.ask(*parts, extra_body={"rid": rid} if rid else {})
        assert rid is None or answer.id == rid
        records = limited.telemetry.records(answer.id)
        assert records == limited.traced(answer.id) and records
        assert (records[0].prefix_len > 100) == again  # what is before the media is cached anyway
        assert records[-1].map and records[-1].seq_len == answer.usage.prompt_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens == records[0].prefix_len
        if not again:
            assert len(records) > 2 and {record.sparse_layers for record in records} >= {2}


def test_generate_tells_its_id(limited: Limited, media: Media) -> None:
    body = {"text": f"{IMAGE_TOKEN}Why?", "image_data": str(media.images[0]), "sampling_params": {"max_new_tokens": 1}}
    answer = limited.http.post("/generate", json=body).raise_for_status().json()
    rid = answer["meta_info"]["id"]
    assert limited.telemetry.records(rid) == limited.traced(rid) != []


def test_records_are_there_with_the_first_token(limited: Limited, media: Media) -> None:
    stream = limited.openai.chat.completions.create(
        model="default",
        messages=[user(image(media.images[1]), text("Tell me."))],
        max_tokens=16,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = next(iter(stream))
    assert limited.telemetry.records(first.id)[-1].map
    stream.close()


def test_a_server_tells_how_it_serves_and_what_it_did(limited: Limited, media: Media, sparse_config: Path) -> None:
    before = limited.telemetry.server()
    answer = limited.ask(video(media.videos[1]), text("And here?"))
    after = limited.telemetry.server()
    assert after.serving is not None and after.serving.head_config == str(sparse_config)
    assert (after.serving.named_by, after.serving.executor) == ("--mminfer-config", "torch")
    assert after.serving.dense_backend == "torch_native" and after.serving.dense_reason is None
    assert after.replicas == 1 and "separate_videos" in after.mends
    records = limited.traced(answer.id)
    new = sum(record.chunk_len for record in records)
    assert sum(after.counters.tokens.values()) - sum(before.counters.tokens.values()) == new
    assert after.kept.records - before.kept.records == len(records)
    expected = sum(r.chunk_len * (r.density or 0) for r in read_trace(limited.trace))
    assert after.counters.density_tokens == pytest.approx(expected)


def test_the_key_is_asked_for(limited: Limited) -> None:
    for path in ("/mminfer", "/mminfer/requests/a"):
        assert httpx.get(limited.server.url + path, trust_env=False).status_code == 401
    with pytest.raises(NoTelemetry, match="answers 401"):
        Telemetry(limited.server.url, "wrong").server()


def test_an_unknown_request_is_a_404_that_says_why(limited: Limited) -> None:
    with pytest.raises(NoTelemetry, match="answers 404: no prefill of request 'nobody' is remembered"):
        limited.telemetry.records("nobody")


def test_server_info_is_as_ever_beside_many_questions(limited: Limited) -> None:
    """Both travel as SGLang's question for the internal state; neither gets the other's answer."""
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda path=path: answers.append((path, limited.http.get(path))))
        for path in ("/server_info", "/mminfer", "/mminfer/requests/nobody") * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path, answer in answers:
        if path == "/server_info":
            (state,) = answer.json()["internal_states"]
            assert "effective_max_running_requests_per_dp" in state
        elif path == "/mminfer":
            assert "counters" in answer.json()
        else:
            assert answer.status_code == 404
    assert len(answers) == 12


# ---- the media root --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret(limited: Limited, media: Media, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside, with a picture and a video; and a link to it inside."""
    folder = tmp_path_factory.mktemp("secret")
    (folder / "x.png").write_bytes(media.images[0].read_bytes())
    (folder / "x.mp4").write_bytes(media.videos[2].read_bytes())
    (limited.root / "link").symlink_to(folder)
    return folder


def names(limited: Limited, secret: Path, file: str) -> list[str]:
    return [
        f"{secret}/{file}",
        f"file://{secret}/{file}",
        f"{limited.root}/link/{file}",
        f"{limited.root}/../{secret.name}/{file}",
        "/etc/passwd",
        "/nowhere.png",
    ]


def refused(answer: httpx.Response, name: str, limited: Limited) -> None:
    words = answer.text.replace("\\\\", "\\")
    assert answer.status_code == 400, answer.text
    assert name in words and str(limited.root) in words and "--mminfer-media-root" in words


@pytest.mark.parametrize("file", ["x.png", "x.mp4"])
def test_chat_completions(limited: Limited, secret: Path, file: str) -> None:
    kind = "image_url" if file == "x.png" else "video_url"
    for name in names(limited, secret, file):
        body = {"model": "default", "max_tokens": 1}
        body["messages"] = [user({"type": kind, kind: {"url": name}}, text("Why?"))]
        refused(limited.http.post("/v1/chat/completions", json=body), name, limited)
        streamed = limited.http.post("/v1/chat/completions", json=body | {"stream": True})
        assert name in streamed.text and "--mminfer-media-root" in streamed.text


@pytest.mark.parametrize("file", ["x.png", "x.mp4"])
def test_generate(limited: Limited, media: Media, secret: Path, file: str) -> None:
    field, token = ("image_data", IMAGE_TOKEN) if file == "x.png" else ("video_data", VIDEO_TOKEN)
    allowed = str(media.images[0] if file == "x.png" else media.videos[0])
    for name in names(limited, secret, file):
        for prompt, data in (
            (f"{token}?", name),
            (f"{token}{token}?", [allowed, name]),
            (["a", f"{token}?"], [[], [name]]),
        ):
            body = {"text": prompt, field: data, "sampling_params": {"max_new_tokens": 1}}
            refused(limited.http.post("/generate", json=body), name, limited)
    body = {"text": f"{IMAGE_TOKEN}?", "audio_data": "/etc/passwd", "sampling_params": {"max_new_tokens": 1}}
    refused(limited.http.post("/generate", json=body), "/etc/passwd", limited)


def test_other_apis(limited: Limited, secret: Path) -> None:
    name = f"{secret}/x.png"
    content = [{"type": "image", "source": {"type": "url", "url": name}}, {"type": "text", "text": "Why?"}]
    body = {"model": "default", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    answer = limited.http.post("/v1/messages", json=body)
    assert answer.status_code == 400 and limited.traced("x") == []


def test_files_inside_and_contents_are_taken(limited: Limited, media: Media, secret: Path) -> None:
    picture = base64.b64encode((secret / "x.png").read_bytes()).decode()
    film = base64.b64encode((secret / "x.mp4").read_bytes()).decode()
    for part in (
        image(media.images[2]),
        video(media.videos[2]),
        {"type": "image_url", "image_url": {"url": f"file://{media.images[2]}"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{film}"}},
    ):
        assert limited.ask(part, text("Why?")).usage.prompt_tokens > 10


def test_a_playlist_opens_nothing(limited: Limited, secret: Path) -> None:
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}/x.mp4\n#EXT-X-ENDLIST\n"
    url = f"data:video/mp4;base64,{base64.b64encode(playlist.encode()).decode()}"
    with pytest.raises(openai.BadRequestError, match="playlist"):
        limited.ask({"type": "video_url", "video_url": {"url": url}}, text("Why?"))


def test_a_chat_sends_what_the_server_may_not_read(limited: Limited, secret: Path) -> None:
    """The chat application names the files of this machine, and sends them where that does not work."""
    from sglang_mminfer.tools.chat.conversation import Conversation, Question, Sampling
    from sglang_mminfer.tools.chat.endpoint import Endpoint, NoServer
    from sglang_mminfer.tools.chat.reply import Phase
    from sglang_mminfer.tools.chat.uploads import KINDS, Limits, check

    with pytest.raises(NoServer, match="API key"):
        asyncio.run(Endpoint(limited.server.url).facts())
    endpoint = Endpoint(limited.server.url, KEY)
    facts = asyncio.run(endpoint.facts())
    limits = Limits(facts.model, frozenset(KINDS), {}, 1 << 30, secret)
    conversation = Conversation(endpoint)
    assert endpoint.as_files

    async def asked(question: Question) -> None:
        async for turn in conversation.ask(question, Sampling(max_tokens=2)):
            assert turn.reply.phase is not Phase.FAILED, turn.reply.error

    asyncio.run(asked(Question("Why?", tuple(check([secret / "x.mp4", secret / "x.png"], limits)))))
    assert not endpoint.as_files
    asyncio.run(asked(Question("And now?")))
    first, second = (turn.reply for turn in conversation.turns)
    assert (second.cached_tokens or 0) >= (first.prompt_tokens or 0) > 10
    assert first.sent_bytes > (secret / "x.mp4").stat().st_size


def test_the_server_still_answers(limited: Limited) -> None:
    assert limited.ask(text("Still there?")).choices
    assert msgspec.json.decode(limited.http.get("/mminfer").content)["counters"]["requests"]["sparse"] > 0

"""What a client sends and how long it waits for each turn of a conversation with three videos.

    python -m sglang_mminfer.benchmarks.client_turns [--out FILE]

The first three turns bring a video each, the others are words alone. Four clients have the same conversation with one
server, each with an empty radix cache: chat completions with videos as data: URLs and as paths, and a program of
SGLang's frontend through `MediaEndpoint`, the same two ways. Bytes are counted on the wire, by a relay between client
and server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools import connections, machine
from sglang_mminfer.tools.media import make_video
from sglang_mminfer.tools.server import Server, shown_wait

VIDEOS = 3
WORDS = "What happens here, and how does it go on?"
ANSWER_TOKENS = 8

Way = Literal["data", "path"]
Turn = dict[str, Any]


class Relay:
    """Passes connections on to a server and counts what clients send.

    Attributes:
        url: what clients connect to.
        sent: bytes that clients have sent so far.
    """

    def __init__(self, url: str) -> None:
        self._host, self._port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
        self._loop = asyncio.new_event_loop()
        self.sent = 0
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Relay]:
        """Relays while the block lasts."""
        listening = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    async def _end(self) -> None:
        """Ends connections that clients have left open."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(self._host, self._port)
        with suppress(asyncio.CancelledError):  # asyncio would tell of it
            await asyncio.gather(self._pass_on(reader, to_server, True), self._pass_on(from_server, writer, False))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.sent += len(data) if counted else 0
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the other side has gone
        finally:
            writer.close()


class Watch:
    """Bytes and seconds of one turn after the other."""

    def __init__(self, relay: Relay) -> None:
        self._relay, self.turns = relay, list[Turn]()
        self._begin()

    def _begin(self) -> None:
        self._seconds, self._sent = time.perf_counter(), self._relay.sent

    def turn(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A turn has ended."""
        seconds = round(time.perf_counter() - self._seconds, 3)
        sent = self._relay.sent - self._sent
        self.turns.append(
            {"sent_bytes": sent, "seconds": seconds, "prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens}
        )
        self._begin()


def chat(relay: Relay, model: str, videos: Sequence[Path], turns: int, way: Way) -> list[Turn]:
    """The conversation through /v1/chat/completions, as the `openai` package sends it."""

    client = connections.openai_client(relay.url, timeout=3600)
    messages: list[Any] = []
    watch = Watch(relay)
    for turn in range(turns):
        parts: list[dict[str, Any]] = [{"type": "text", "text": WORDS}]
        if turn < len(videos):
            content = videos[turn].read_bytes() if way == "data" else b""
            inline = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
            url = inline if way == "data" else videos[turn].as_uri()
            parts.insert(0, {"type": "video_url", "video_url": {"url": url}})
        messages.append({"role": "user", "content": parts})
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        watch.turn(answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens or 0)
    return watch.turns


def program(relay: Relay, model: str, videos: Sequence[Path], turns: int, way: Way) -> list[Turn]:
    """The conversation as a program of SGLang's frontend."""
    import sglang as sgl

    from sglang_mminfer.frontend import MediaEndpoint

    endpoint = MediaEndpoint(relay.url, media=way)
    watch = Watch(relay)

    def talk(s: Any) -> None:
        for turn in range(turns):
            s += sgl.user((sgl.video(str(videos[turn]), -1) if turn < len(videos) else "") + WORDS)
            s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True))
            info = s.get_meta_info(f"answer{turn}")
            watch.turn(info["prompt_tokens"], info["cached_tokens"])

    sgl.function(talk).run(backend=endpoint)
    return watch.turns


CLIENTS: dict[str, tuple[Callable[..., list[Turn]], Way]] = {
    "chat completions, data: URLs": (chat, "data"),
    "chat completions, paths": (chat, "path"),
    "frontend program, media='data'": (program, "data"),
    "frontend program, media='path'": (program, "path"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--frames", type=int, default=480, help="of each video, at 24 a second")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_tiny_qwen2_5_vl(folder / "tiny")
        videos = [make_video(folder / f"{n}.mp4", options.frames, 640, 360, seed=n) for n in range(VIDEOS)]
        flags = ("--attention-backend", "mminfer", "--enable-cache-report", "--context-length", "32768")
        with shown_wait("server starts") as wait, Server(model, *flags, progress=wait) as server:
            results = {}
            for name, (client, way) in CLIENTS.items():
                httpx.post(f"{server.url}/flush_cache", timeout=60, trust_env=False).raise_for_status()
                with Relay(server.url).running() as relay:
                    results[name] = client(relay, server.model, videos, options.turns, way)
                print(name)
                for number, turn in enumerate(results[name], 1):
                    print(f"  turn {number}: {turn}", flush=True)
        video_bytes = [video.stat().st_size for video in videos]
    if options.out is not None:
        report = {
            "date": str(date.today()),
            "machine": machine.describe(),
            "command": f"python -m sglang_mminfer.benchmarks.client_turns --turns {options.turns} "
            f"--frames {options.frames}",
            "video_bytes": video_bytes,
            "clients": results,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

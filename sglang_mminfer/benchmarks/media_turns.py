"""Where the time to the first token goes in each turn of a conversation with three long videos, with and without kept
media.

    python -m sglang_mminfer.benchmarks.media_turns [--out FILE]

The first three turns bring a video each, the others are words alone. Two servers, one after the other, have the same
conversation: one keeps no decoded and preprocessed videos (SGLANG_MMINFER_MEDIA_CACHE_MB=0), the other keeps them as by
default. Each has it several times, every time with empty caches. Stages are those that the servers tell at
GET /mminfer/requests/{rid}; processor seconds are those of all processes of a server, which work beside it changes
less than it changes wall time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
import psutil

from sglang_mminfer import settings
from sglang_mminfer.serving.telemetry_http import RequestReport
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools import machine
from sglang_mminfer.tools.media import make_video
from sglang_mminfer.tools.server import Server, shown_wait

VIDEOS = 3
WORDS = "What happens here, and how does it go on?"
ANSWER_TOKENS = 4
Turn = dict[str, Any]
SUMS = ("plan_ms", "attn_ms", "encode_ms", "forward_ms")


def prepared(folder: Path, frames: int) -> tuple[Path, list[Path]]:
    """The model and the videos in a folder; those that are not there are made."""
    folder.mkdir(parents=True, exist_ok=True)
    model, videos = folder / "tiny", [folder / f"{n}-{frames}.mp4" for n in range(VIDEOS)]
    if not (model / "config.json").exists():
        make_tiny_qwen2_5_vl(model)
    for seed, video in enumerate(videos):
        if not video.exists():
            make_video(video.with_suffix(".part.mp4"), frames, 640, 360, seed=seed).rename(video)
    return model, videos


def processor_seconds(server: Server) -> float:
    """CPU seconds of all processes of a server since they began."""
    root = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def conversation(server: Server, videos: Sequence[Path], turns: int, name: str) -> list[Turn]:
    """The turns of one conversation, from empty caches."""
    server.flush_cache()
    client = server.client(timeout=3600)
    messages: list[Any] = []
    measured = []
    for number in range(turns):
        parts: list[dict[str, Any]] = [{"type": "text", "text": WORDS}]
        if number < len(videos):
            parts.insert(0, {"type": "video_url", "video_url": {"url": videos[number].as_uri()}})
        messages.append({"role": "user", "content": parts})
        rid = f"{name}-{number}"
        processor, begin, first = processor_seconds(server), time.perf_counter(), 0.0
        text, usage = "", None
        for chunk in client.chat.completions.create(
            model=server.model,
            messages=messages,
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "rid": rid},
        ):
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - begin
                text += chunk.choices[0].delta.content
        first = first or time.perf_counter() - begin  # an answer of tokens without text
        told = httpx.get(f"{server.url}/mminfer/requests/{rid}", timeout=60, trust_env=False).raise_for_status()
        report = msgspec.json.decode(told.content, type=RequestReport)
        assert usage is not None and usage.prompt_tokens_details is not None and report.media is not None
        messages.append({"role": "assistant", "content": text})
        measured.append(
            {
                "ttft_s": round(first, 3),
                "processor_s": round(processor_seconds(server) - processor, 2),
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.prompt_tokens_details.cached_tokens or 0,
                "text": text,
                **{name: round(value) for name, value in msgspec.structs.asdict(report.media).items()},
                **{name: round(sum(getattr(record, name) for record in report.records)) for name in SUMS},
            }
        )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="conversations with each server")
    parser.add_argument("--frames", type=int, default=1920, help="of each video, at 24 a second")
    parser.add_argument("--fps", type=float, default=0.5, help="frames a second that the servers sample")
    parser.add_argument("--folder", type=Path, help="where model and videos are made, or lie from an earlier run")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args()
    results: dict[str, list[list[Turn]]] = {}
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        model, videos = prepared(folder, options.frames)
        flags = ["--attention-backend", "mminfer", "--enable-cache-report", "--context-length", "32768"]
        flags += ["--mm-process-config", json.dumps({"video": {"fps": options.fps}})]
        for name, megabytes in (("off", "0"), ("on", settings.MEDIA_CACHE_MB.default)):
            env = {settings.MEDIA_CACHE_MB.variable: megabytes}
            with shown_wait("server starts") as wait, Server(model, *flags, env=env, progress=wait) as server:
                results[name] = [
                    conversation(server, videos, options.turns, f"{name}-{number}") for number in range(options.rounds)
                ]
                report = httpx.get(f"{server.url}/mminfer", timeout=60, trust_env=False).raise_for_status().json()
                kept[name] = report["media_cache"]
            print(f"media cache {name}: {kept[name]}")
            for number in range(options.turns):
                shown = {
                    key: round(median(turns[number][key] for turns in results[name]), 3)
                    for key, value in results[name][0][number].items()
                    if not isinstance(value, str)
                }
                print(f"  turn {number + 1}: {shown}", flush=True)
        video_bytes = [video.stat().st_size for video in videos]
    same = [turn["text"] for turns in results["off"] for turn in turns] == [
        turn["text"] for turns in results["on"] for turn in turns
    ]
    print(f"same answers: {same}")
    if options.out is not None:
        report = {
            "date": str(date.today()),
            "machine": machine.describe(),
            "command": f"python -m sglang_mminfer.benchmarks.media_turns --turns {options.turns} "
            f"--rounds {options.rounds} --frames {options.frames} --fps {options.fps:g}",
            "video_bytes": video_bytes,
            "media_cache": kept,
            "same_answers": same,
            "turns": results,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Prefill of long videos in the real server on a CPU: mminfer against stock dense, in one run.

    python -m sglang_mminfer.benchmarks.server_prefill [--tokens 4096 8192 16384 32768] [--runs 3] [--out FILE]

Stock dense is measured twice, with chunked prefill and without, because SGLang's `torch_native` computes redundant
rows for every chunk. Its figures come from the plugin with the config `dense`, which hands every layer to the stock
backend and only measures the time. A server without the plugin's backend is timed from outside as well, to show that
this changes nothing. Every prompt is sent once to fill the cache of vision embeddings, and is timed after the radix
cache was flushed, so `forward_ms` is the language model alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_mminfer import settings
from sglang_mminfer.serving.trace import PrefillRecord, read_trace
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools import machine
from sglang_mminfer.tools.media import make_video
from sglang_mminfer.tools.server import Server, shown_wait

FRAME_TOKENS = 256  # 448 x 448 pixels, 28 x 28 pixels a token; two frames share these tokens
SIDE = 448
CHUNK = 2048

SERVERS = {
    "mminfer, whole prompt": (
        *("--attention-backend", "mminfer", "--mminfer-config", "{config}"),
        *("--chunked-prefill-size", "-1"),
    ),
    "mminfer, chunked": (
        *("--attention-backend", "mminfer", "--mminfer-config", "{config}"),
        *("--chunked-prefill-size", str(CHUNK)),
    ),
    "stock, whole prompt": (
        "--attention-backend",
        "mminfer",
        "--mminfer-config",
        "dense",
        "--chunked-prefill-size",
        "-1",
    ),
    "stock, chunked": (
        *("--attention-backend", "mminfer", "--mminfer-config", "dense"),
        *("--chunked-prefill-size", str(CHUNK)),
    ),
    "without plugin, whole prompt": ("--attention-backend", "torch_native", "--chunked-prefill-size", "-1"),
}


def measure(
    names: list[str], config: str, model: Path, videos: dict[int, Path], repeats: int, folder: Path, console: Console
) -> Results:
    """server -> tokens -> {"prompt_tokens", "attn_ms", "plan_ms", "forward_ms", "ttft_ms", "density"}, medians, and
    "rounds", the times of each round.

    All servers run at once, and all but the one that is asked are idle. They take turns, request by request, so a
    machine that slows down or speeds up does so for all of them.
    """
    longest = max(videos) + 1024
    room = ("--context-length", str(longest), "--max-total-tokens", str(longest + 8192))
    figures: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    with ExitStack() as stack:
        servers = {}
        for name in names:
            trace = folder / f"{name.replace(', ', '_').replace(' ', '_')}.jsonl"
            with shown_wait(f"{name}: server starts") as wait:
                flags = [flag.format(config=config) for flag in SERVERS[name]]
                server = Server(model, *flags, *room, env={settings.TRACE.variable: str(trace)}, progress=wait)
                servers[name] = stack.enter_context(server), trace
        for tokens, video in sorted(videos.items()):
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for turn in range(repeats + 1):
                for name, (server, trace) in servers.items():
                    figure = _ask(server, trace, video)
                    if turn:  # turn 0 fills the embedding cache
                        runs[name].append(figure)
            for name in names:
                figures[name][tokens] = {
                    **{key: _median(run[key] for run in runs[name]) for key in runs[name][0]},
                    "rounds": [{key: run[key] for key in ("attn_ms", "forward_ms", "ttft_ms")} for run in runs[name]],
                }
                console.print(f"{name}: {tokens} video tokens: {_line(figures[name][tokens])}")
    return figures


def _ask(server: Server, trace: Path, video: Path) -> dict[str, Any]:
    """Send one prompt of which nothing is in the radix cache. Returns its figures."""
    server.flush_cache()
    seen = len(read_trace(trace)) if trace.exists() else 0
    content = [
        {"type": "video_url", "video_url": {"url": str(video)}},
        {"type": "text", "text": "What happens here?"},
    ]
    started = time.perf_counter()
    answer = server.client(timeout=3600).chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": content}], max_tokens=1, temperature=0
    )
    ttft_ms = (time.perf_counter() - started) * 1e3
    records = read_trace(trace)[seen:] if trace.exists() else []
    return _sum(records, answer.usage.prompt_tokens, ttft_ms)


def _sum(records: list[PrefillRecord], prompt_tokens: int, ttft_ms: float) -> dict[str, Any]:
    prompt_records = [r for r in records if not r.rid.startswith("HEALTH_CHECK")]
    if prompt_records:
        computed = sum(r.chunk_len for r in prompt_records)
        if computed != prompt_tokens:
            raise RuntimeError(f"expected a prefill of {prompt_tokens} tokens in the trace, got {computed}")
    causal = [(r.prefix_len + 1 + r.seq_len) * r.chunk_len / 2 for r in prompt_records]
    dense = [1.0 if r.density is None else r.density for r in prompt_records]
    return {
        "prompt_tokens": prompt_tokens,
        "attn_ms": sum(r.attn_ms for r in prompt_records) if prompt_records else None,
        "plan_ms": sum(r.plan_ms for r in prompt_records) if prompt_records else None,
        "forward_ms": sum(r.forward_ms for r in prompt_records) if prompt_records else None,
        "ttft_ms": ttft_ms,
        "density": sum(d * c for d, c in zip(dense, causal)) / sum(causal) if prompt_records else None,
    }


def _median(values: Iterable[Any]) -> Any:
    measured = [value for value in values if value is not None]
    return round(median(measured), 4) if measured else None


def _line(figure: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:,.4g}" for key, value in figure.items() if isinstance(value, (int, float)))


Results = dict[str, dict[int, dict[str, Any]]]
"""What one run gives: server -> tokens -> figures; see `measure`."""

Spread = dict[str, float]
"""The "median" of what each run has as median, the "least" and the "most" of all rounds."""


def speedups(runs: list[Results]) -> dict[str, dict[int, dict[str, Spread]]]:
    """mminfer server -> tokens -> speed-up of attention and of the whole forward over the better stock server.

    Servers take turns, so that each round is a comparison of its own: a machine that changes its pace between rounds
    shows in the spread.
    """

    def of_rounds(results: Results, name: str, tokens: int, key: str) -> list[float]:
        stock = [[r[key] for r in results[other][tokens]["rounds"]] for other in results if other.startswith("stock")]
        own = [r[key] for r in results[name][tokens]["rounds"]]
        return [round(min(theirs) / ours, 3) for *theirs, ours in zip(*stock, own)]

    def spread(name: str, tokens: int, key: str) -> Spread:
        ratios = [of_rounds(results, name, tokens, key) for results in runs]
        every = [ratio for run in ratios for ratio in run]
        return {"median": round(median(map(median, ratios)), 3), "least": min(every), "most": max(every)}

    return {
        name: {
            tokens: {key: spread(name, tokens, f"{key}_ms") for key in ("attn", "forward")} for tokens in runs[0][name]
        }
        for name in runs[0]
        if name.startswith("mminfer")
    }


def _shown(ratio: Spread) -> str:
    return f"{ratio['median']:.2f} x ({ratio['least']:.2f} to {ratio['most']:.2f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="video tokens")
    parser.add_argument("--runs", type=int, default=1, help="how often all servers are started anew")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of a run: how often each prompt is timed")
    parser.add_argument("--config", default="default", help="head config of the sparse servers")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="which of them to run")
    parser.add_argument("--out", type=Path, default=Path("sglang_mminfer/benchmarks/results/cpu_prefill.json"))
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="mminfer-bench-") as name:
        folder = Path(name)
        model = make_tiny_qwen2_5_vl(
            folder / "model",
            layers=options.layers,
            hidden=4 * options.head_dim,
            heads=4,
            kv_heads=2,
            head_dim=options.head_dim,
            max_positions=65536,
        )
        videos = {}
        for tokens in sorted(options.tokens):
            frames = 2 * (tokens // FRAME_TOKENS)
            videos[tokens] = make_video(folder / f"{tokens}.mp4", frames, SIDE, SIDE, 2.0, seed=tokens)
        runs = []
        for number in range(options.runs):
            place = folder / f"run_{number}"
            place.mkdir()
            runs.append(measure(options.servers, options.config, model, videos, options.repeats, place, console))
    ratios = speedups(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        **machine.describe(),
        "date": date.today().isoformat(),
        "model": f"tiny Qwen2.5-VL, {options.layers} layers, 4/2 heads of {options.head_dim}, random weights, fp32",
        "config": options.config,
        "chunk": CHUNK,
        "repeats": options.repeats,
        "runs": runs,
        "speedup_over_better_stock": ratios,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("server", "video tokens", "density", "attention ms", "over stock", "forward ms", "over stock")
    for server, by_length in ratios.items():
        for tokens, ratio in by_length.items():
            figures = [run[server][tokens] for run in runs]
            table.add_row(
                server,
                f"{tokens:,}",
                f"{figures[0]['density']:.3f}",
                f"{median(figure['attn_ms'] for figure in figures):,.0f}",
                _shown(ratio["attn"]),
                f"{median(figure['forward_ms'] for figure in figures):,.0f}",
                _shown(ratio["forward"]),
            )
    console.print(table)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

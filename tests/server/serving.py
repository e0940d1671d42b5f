"""The real servers that the tests of this folder share, the conversations they get, and the expected answers."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from config_files import config_file
from sglang_mminfer import settings
from sglang_mminfer.serving.trace import PrefillRecord, read_trace
from sglang_mminfer.testing.oracle import Comparison, Message, OracleAnswer, ask, compare
from sglang_mminfer.tools.server import Server

LAYERS = 2
RECIPE = {"layers": LAYERS, "heads": 8, "kv_heads": 2, "head_dim": 16, "vision_full_blocks": 1}
"""The model of all tests here. Its layers have 16 heads together, so a test config uses every entry of its cycle."""

MEDIUM_TOKENS, MEDIUM_FRAME = 2048, 256
LONG_TOKENS = 16_384

PAGE = 16
"""The page size of the servers "paged" and "eagle3"."""

DENSE_BELOW = 200
"""`dense_below` of the sparse config: conversations up to this length run dense."""

ROUNDING = 1e-4
"""The most that another order of fp32 sums may change a log-probability of this model."""

TIE = 1e-3
"""Two tokens whose log-probabilities differ by less are a tie; rounding decides which one comes."""

GUARD_ERROR = 0.2
"""The output error that the guard of the server "guarded" lets a head have."""

VOCABULARY = ["river", "stone", "green", "light", "walk", "seven", "winter", "train", "music", "north", "open", "quiet"]

_MMINFER = ("--attention-backend", "mminfer", "--sleep-on-idle")
_SPARSE = (*_MMINFER, "--mminfer-config", "{sparse}")
_SPLIT = ("--prefill-attention-backend", "mminfer", "--decode-attention-backend", "torch_native", "--sleep-on-idle")

SPECULATION = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "{draft}")

# In the order in which tests need them: `covering_off` just before `one_shot`, whose answers it is compared with.
FLAGS: dict[str, tuple[str, ...]] = {
    # Configs that leave nothing out: the sparse path gives the dense answers.
    "covering_64": (*_MMINFER, "--mminfer-config", config_file("test_covering_mixed"), "--chunked-prefill-size", "64"),
    "covering_256_no_radix": (
        *(*_MMINFER, "--mminfer-config", config_file("test_covering")),
        *("--chunked-prefill-size", "256", "--disable-radix-cache"),
    ),
    "covering_256": (*_MMINFER, "--mminfer-config", config_file("test_covering"), "--chunked-prefill-size", "256"),
    "covering_off": (*_MMINFER, "--mminfer-config", config_file("test_covering"), "--chunked-prefill-size", "-1"),
    # The sparse config. `one_shot` computes every prompt in one chunk with nothing cached: the reference of the others.
    "one_shot": (
        *(*_SPARSE, "--chunked-prefill-size", "-1"),
        *("--disable-radix-cache", "--disable-overlap-schedule"),
    ),
    "ranks_2": (
        *(*_SPARSE, "--chunked-prefill-size", "96", "--tp-size", "2"),
        *("--enable-metrics", "--mminfer-audit", "1"),
    ),
    # Pages of 16, another backend for decoding, and a small KV pool that admits requests too eagerly.
    "paged": (
        *(*_SPLIT, "--mminfer-config", "{sparse}", "--chunked-prefill-size", "128", "--page-size", str(PAGE)),
        *("--max-total-tokens", "2304", "--schedule-conservativeness", "0.05"),
    ),
    # Audited. All its answers are compared with references, which shows that an audit changes no answer.
    "main": (
        *(*_SPARSE, "--chunked-prefill-size", "96", "--enable-mixed-chunk", "--enable-metrics"),
        *("--mminfer-audit", "1"),
    ),
    # A draft model beside ours; test_speculative.py makes it. Three tokens are proposed for each request.
    "eagle3": (*_SPARSE, "--chunked-prefill-size", "96", "--page-size", str(PAGE), "--enable-metrics", *SPECULATION),
    # Ways to serve that only `make test-wide` starts. See test_ways_to_serve.py.
    "pp_2": (*_SPARSE, "--chunked-prefill-size", "96", "--pp-size", "2", "--enable-metrics"),
    "dp_2": (*_SPARSE, "--chunked-prefill-size", "96", "--dp-size", "2", "--enable-metrics"),
    # One head sees too little, and the guard finds it.
    "guarded": (
        *(*_MMINFER, "--mminfer-config", config_file("test_one_wrong_head"), "--chunked-prefill-size", "256"),
        *("--disable-radix-cache", "--enable-metrics", "--mminfer-audit", "1", "--mminfer-guard", str(GUARD_ERROR)),
    ),
    "fp8": (
        *(*_MMINFER, "--mminfer-config", config_file("test_covering_mixed"), "--chunked-prefill-size", "96"),
        *("--kv-cache-dtype", "fp8_e4m3", "--mminfer-audit", "1"),
    ),
}


RETRACTS = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "16"}
"""SGLang's own switches for tests: every 16th step retracts a request, if two or more run."""

ENVIRONMENT = {
    # Seconds that SGLang waits for a medium behind a URL: long enough to abort meanwhile.
    "main": {"REQUEST_TIMEOUT": "60"},
    # Dense heads run on the stock backend here, as on a GPU.
    "paged": {**RETRACTS, "SGLANG_MMINFER_DENSE_HEADS": "stock"},
    "eagle3": RETRACTS,
}


def write_sparse_config(path: Path) -> Path:
    """Writes the sparse config: each static pattern and boundary has a head, and short conversations run dense."""
    config = json.loads(Path(config_file("test_mixed_heads")).read_text())
    config["defaults"]["dense_below"] = DENSE_BELOW
    path.write_text(json.dumps(config))
    return path


# ---- conversations -----------------------------------------------------------------------------------------


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def video(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": str(path)}}


def image(path: Path) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": str(path)}}


def sound(path: Path) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": str(path)}}


def user(*parts: dict[str, Any]) -> Message:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> Message:
    return {"role": "assistant", "content": words}


@dataclass(frozen=True)
class Media:
    """The media of the conversations."""

    videos: tuple[Path, ...]
    images: tuple[Path, ...]
    medium_video: Path
    """Has MEDIUM_TOKENS tokens, MEDIUM_FRAME for each pair of frames."""
    long_video: Path
    """Has LONG_TOKENS tokens."""

    def six_turns(self) -> list[Message]:
        """The user's messages of a conversation with 2 videos and 3 images."""
        first, second, *_ = self.videos
        a, b, c, *_ = self.images
        return [
            user(video(first), text("What do you see in the video?")),
            user(text("And now?")),
            user(image(a), text("Compare both.")),
            user(image(b), text("Is that so?"), image(c), text("Which one came first?")),
            user(text("Tell me more."), video(second)),
            user(text("Where did it go? Please answer in one word.")),
        ]

    def conversation(self, seed: int, turns: int) -> list[Message]:
        """The user's messages of a random conversation. With the same seed a longer one begins in the same way."""
        draw = random.Random(seed)
        messages = []
        for _ in range(turns):
            kind = draw.choice(["video", "video", "image", "images", "text", "text"])
            parts = [text(self.words(draw))]
            if kind == "video":
                parts.insert(draw.randrange(2), video(draw.choice(self.videos)))
            elif kind != "text":
                pictures = draw.sample(self.images, 1 if kind == "image" else 2)
                parts += [image(picture) for picture in pictures]
                draw.shuffle(parts)
            messages.append(user(*parts))
        return messages

    @staticmethod
    def words(draw: random.Random, most: int = 30) -> str:
        return " ".join(draw.choices(VOCABULARY, k=draw.randint(2, most)))


Dialogue = list[tuple[list[Message], OracleAnswer]]
"""Prompts and the expected answers."""


@dataclass(frozen=True)
class References:
    """Prompts and answers of the sparse config, from a server that computes each prompt in one chunk."""

    turns: Dialogue
    """The turns of a conversation with 2 videos and 3 images."""
    branches: Dialogue
    """Two conversations with the same first turn."""
    others: Dialogue
    """Seven other conversations."""
    medium: tuple[list[Message], OracleAnswer]
    """A question about the video of MEDIUM_TOKENS."""

    @property
    def batch(self) -> Dialogue:
        """Eight conversations."""
        return [self.turns[-1], *self.others]


def scripted(turns: Sequence[Message], seed: int = 0) -> list[list[Message]]:
    """The prompt of every turn. The earlier answers in it are drawn from `seed`, so no prompt depends on a server."""
    draw = random.Random(seed)
    prompts, messages = [], []
    for turn in turns:
        messages = [*messages, turn]
        prompts.append(messages)
        messages = [*messages, assistant(Media.words(draw, 12))]
    return prompts


# ---- servers -----------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A running server and its trace."""

    server: Server
    trace: Path

    @cached_property
    def client(self) -> Any:
        return self.server.client()

    def ask(self, messages: Sequence[Message], new_tokens: int = 8, **extra: Any) -> OracleAnswer:
        return ask(self.client, messages, new_tokens, **extra)

    def ask_all(
        self, prompts: Iterable[Sequence[Message]], new_tokens: int = 8, rids: Iterable[str] | None = None
    ) -> list[OracleAnswer]:
        """Asks all prompts at the same time."""
        prompts = list(prompts)
        extras: list[dict[str, str]] = [{"rid": rid} for rid in rids] if rids else [{} for _ in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            waiting = [pool.submit(self.ask, p, new_tokens, **e) for p, e in zip(prompts, extras, strict=True)]
            return [answer.result() for answer in waiting]

    def ask_and_leave(
        self, messages: Sequence[Message], new_tokens: int, when: Callable[[], object], rid: str, seconds: float = 60
    ) -> None:
        """Asks for a stream, does not read it, and closes the connection as soon as `when` is true."""
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=60)
        body = {
            **{"model": "default", "messages": list(messages), "max_tokens": new_tokens, "stream": True},
            **{"ignore_eos": True, "temperature": 0, "rid": rid},
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        try:
            wait_for(when, seconds)
        finally:
            connection.close()

    def records(self, rid: str | None = None) -> list[PrefillRecord]:
        """The trace records of one request, or of all."""
        records = read_trace(self.trace) if self.trace.exists() else []
        return [r for r in records if rid is None or r.rid == rid]

    def get(self, path: str) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.server.url + path, timeout=60) as answer:
            return answer.read()

    def used_tokens(self) -> int:
        """Used slots of the KV pool, cached tokens included."""
        (load,) = json.loads(self.get("/v1/loads"))["loads"]
        return int(load["num_used_tokens"])


def serve(
    folder: Path,
    model: Path,
    flags: Iterable[str],
    environment: Mapping[str, str | None],
    make: Callable[..., Server] = Server,
) -> Served:
    """A server, not started, whose log, trace and cache are in `folder`."""
    trace = folder / "trace.jsonl"
    for old in folder.glob(f"{trace.name}*"):  # the files of all ranks
        old.unlink()
    # A server learns from its flags that it runs on a CPU, not from the environment of the tests.
    env = {
        **{settings.TRACE.variable: str(trace), settings.SPARSE.variable: "always", "SGLANG_PLATFORM": None},
        **{"XDG_CACHE_HOME": str(folder / "cache"), **environment},  # no basis of an earlier run
    }
    return Served(make(model, *flags, env=env, log=folder / "server.log", timeout=400), trace)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited for {seconds:.0f} s in vain"
        time.sleep(0.02)


def difference(a: OracleAnswer, b: OracleAnswer) -> float:
    """The largest difference in log-probability at positions that both answers reach with the same tokens."""
    return compare(a, b).max_difference


def same(a: OracleAnswer, b: OracleAnswer, within: float = ROUNDING) -> Comparison:
    """Asserts that two answers are equal, apart from ties. Returns how they compare."""
    result = compare(a, b)
    assert result.prompt_equal, f"other prompts: {len(a.prompt_ids)} and {len(b.prompt_ids)} tokens"
    assert result.max_difference <= within, str(result)
    assert result.tokens_equal or is_tie(a, b), str(result)
    return result


def is_tie(a: OracleAnswer, b: OracleAnswer) -> bool:
    """Whether both servers find the first two tokens that differ equally probable; True if no token differs."""
    for x, y, left, right in zip(a.token_ids, b.token_ids, a.top_logprobs, b.top_logprobs):
        if x != y:
            return all(abs(top.get(x, 1e9) - top.get(y, -1e9)) <= TIE for top in (left, right))
    return True


def ran_sparse(records: Sequence[PrefillRecord], layers: int = LAYERS) -> bool:
    """Whether all layers ran sparse in every record, and there is one."""
    return bool(records) and all(r.sparse_layers == layers and r.dense_reason is None for r in records)

"""Requests to a server as JSON, without a client library that would refuse or repeat some."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from serving import Served
from sglang_mminfer.testing.oracle import OracleAnswer

Answer = dict[str, Any]


def post(served: Served, path: str, body: Any, timeout: float = 60) -> tuple[int, Any]:
    """The status and the answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        served.server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with opener.open(request, timeout=timeout) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    try:
        return status, json.loads(raw)
    except ValueError:
        return status, raw.decode(errors="replace")


def generate(served: Served, tokens: int = 4, timeout: float = 60, **body: Any) -> tuple[int, Answer]:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    logprobs = {"return_logprob": True, "top_logprobs_num": 20, "return_prompt_token_ids": True}
    return post(served, "/generate", {"sampling_params": sampling, **logprobs, **body}, timeout)


def fine(answer: tuple[int, Answer]) -> Answer:
    assert answer[0] == 200, answer
    return answer[1]


def as_oracle_answer(answer: Answer) -> OracleAnswer:
    """An answer of /generate, to compare as one of a chat."""
    meta = answer["meta_info"]
    return OracleAnswer(
        prompt_ids=answer["prompt_token_ids"],
        token_ids=[token for _, token, *_ in meta["output_token_logprobs"]],
        top_logprobs=[{token: value for value, token, *_ in row} for row in meta["output_top_logprobs"]],
        text=answer["text"],
        cached_tokens=meta["cached_tokens"],
    )

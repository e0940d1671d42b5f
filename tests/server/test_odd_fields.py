"""Fields that end a stock server are the client's error, and the next request is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from serving import Media, Served
from test_sessions import IMAGE, fine, generate, post

ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a negative id": ({"input_ids": [-1, 0, 3]}, "input_ids[0]"),
    "an id behind the vocabulary": ({"input_ids": [5, 1 << 20]}, "input_ids[1]"),
    "a large id": ({"input_ids": [5, 1 << 40]}, "input_ids[1]"),
    "no words": ({"text": ""}, "prompt: expected at least one token"),
    "log-probabilities of nothing": ({"text": "", "return_logprob": True}, "prompt: expected at least one token"),
    "too many log-probabilities": ({"text": "Hello", "top_logprobs_num": 1 << 20}, "top_logprobs_num"),
    "fewer media than prompts": ({"input_ids": [[5]], "video_data": []}, "request: cannot be read"),
    "less than no log-probabilities": ({"text": "Hello", "top_logprobs_num": -1}, "top_logprobs_num"),
}


@pytest.mark.server("main")
@pytest.mark.parametrize("name", ODD)
def test_odd_fields_are_the_clients_error(servers: Callable[[str], Served], media: Media, name: str) -> None:
    main, (body, said) = servers("main"), ODD[name]
    sampling = {"max_new_tokens": 2, "temperature": 0}
    status, answer = post(main, "/generate", {"sampling_params": sampling, "return_logprob": True, **body})
    assert status == 400 and said in str(answer), answer
    fine(generate(main, text=IMAGE + "?", image_data=str(media.images[0])))

"""Payloads that a client may send: any JSON, close enough to a right request that SGLang processes a part of it."""

from __future__ import annotations

import base64
from typing import Any

from hypothesis import strategies as st

IMAGE_TOKEN, VIDEO_TOKEN = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([1 << 40, -(1 << 63), 1e300, 0.5, ""]),
    st.text(max_size=4),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["url", "format", "type", "id", "a"]), st.text(max_size=3), max_size=2),
)


def nested(one: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One value, a list of values, or a list of lists."""
    return st.one_of(one, st.lists(one, max_size=3), st.lists(st.lists(one, max_size=2), max_size=2))


def files(picture: str, film: str) -> st.SearchStrategy[Any]:
    """Ways to name a medium, right and wrong. Both paths exist."""
    with open(picture, "rb") as file:
        encoded = base64.b64encode(file.read()).decode()
    with open(film, "rb") as file:
        encoded_film = base64.b64encode(file.read()).decode()
    names = [
        *(picture, film, f"file://{picture}", f"file://{film}", encoded, f"data:image/png;base64,{encoded}"),
        *(f"data:video/mp4;base64,{encoded_film}", encoded_film, f"data:image/png;base64,{encoded[:40]}"),
        *("data:image/png;base64,", "data:,", "file:///nowhere", "/nowhere.png", "http://127.0.0.1:9/a.png", "", "x"),
        *("ftp://127.0.0.1/a", "/dev/null", "/", "https://", "data:video/mp4;base64,AAAA", "\x00"),
    ]
    return st.one_of(st.sampled_from(names[:3]), st.sampled_from(names))


def media(picture: str, film: str) -> st.SearchStrategy[Any]:
    """Values of image_data and video_data."""
    name = files(picture, film)
    numbers = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=3)
    described = st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from(
                ["processor_output", "precomputed_embedding", "PROCESSOR_OUTPUT", "raw", 3, None]
            ),
            "url": name,
            "feature": st.one_of(numbers, odd),
            "pixel_values": st.one_of(numbers, odd),
            "image_grid_thw": st.one_of(numbers, odd),
            "offsets": st.one_of(numbers, odd),
            "modality": st.sampled_from(["IMAGE", "VIDEO", "smell", 3]),
            "hash": odd,
            "pad_value": odd,
            "max_dynamic_patch": odd,
            "fps": odd,
            "detail": odd,
        },
    )
    return nested(st.one_of(name, name, described, odd))


def sampling() -> st.SearchStrategy[Any]:
    fields = {
        "temperature": st.sampled_from([0, 0.7, -1, 1e9, "hot", None]),
        "top_p": st.sampled_from([1, 0.5, 0, 2, "x"]),
        "top_k": st.sampled_from([1, -1, 0, 1 << 40, 2.5]),
        "stop": st.sampled_from(["a", ["a", "b"], [], 3, None, [[]]]),
        "n": st.sampled_from([1, 2, 0, -1, "2"]),
        "min_new_tokens": st.sampled_from([0, 1, 9, -1]),
        "regex": st.sampled_from(["a+", "(", None]),
        "repetition_penalty": st.sampled_from([1, 0.5, -2, "x"]),
        "stop_token_ids": st.sampled_from([[1], [], [-1], ["a"], 3]),
        "logit_bias": st.sampled_from([{"1": 1}, {"x": 1}, {"99999999": 1}, 3]),
        "colour": odd,
    }
    right = st.just({"max_new_tokens": 2, "temperature": 0})
    wrong = st.fixed_dictionaries({"max_new_tokens": st.sampled_from([0, 1, 2, 2, -1, "2"])}, optional=fields)
    return st.one_of(right, right, wrong)


def prompts() -> st.SearchStrategy[str]:
    pieces = st.sampled_from(
        [
            "Look. ",
            IMAGE_TOKEN,
            IMAGE_TOKEN,
            VIDEO_TOKEN,
            "<|image_pad|>",
            "<image>",
            "<|vision_end|>",
            "\x00",
            "雪",
            "",
        ]
    )
    return st.lists(pieces, min_size=1, max_size=5).map("".join)


def generate_bodies(picture: str, film: str, sessions: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of /generate."""
    a_medium = media(picture, film)
    fitting = st.sampled_from(
        [
            {"text": IMAGE_TOKEN + "?", "image_data": picture},
            {"text": VIDEO_TOKEN + "?", "video_data": [film]},
            {"text": IMAGE_TOKEN + VIDEO_TOKEN, "image_data": [picture], "video_data": film},
        ]
    )
    session = st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(st.sampled_from(sessions), odd),
            "rid": st.one_of(st.sampled_from(["fuzz-parent", "fuzz-parent", "nobody"]), odd),
            "offset": st.one_of(st.integers(0, 60), odd),
            "replace": st.one_of(st.booleans(), odd),
            "drop_previous_output": st.one_of(st.booleans(), odd),
            "colour": odd,
        },
    )
    ids = st.lists(st.one_of(st.integers(0, 1200), st.sampled_from([-1, 1352, 1353, 1 << 20, 1 << 40, 1 << 70])))
    fields: dict[str, st.SearchStrategy[Any]] = {
        "text": st.one_of(prompts(), odd),
        "input_ids": st.one_of(ids, st.lists(ids, max_size=2), odd),
        "image_data": a_medium,
        "video_data": a_medium,
        "modalities": st.one_of(st.lists(st.sampled_from(["image", "video", "multi-images", "smell"])), odd),
        "mm_hashes": st.one_of(st.lists(st.sampled_from(["ab", "zz", "f" * 40, "-1"]), max_size=3), odd),
        "session_params": st.one_of(session, session, odd),
        "return_logprob": st.sampled_from([True, False, 1]),
        "logprob_start_len": st.sampled_from([-1, 0, 3, 1 << 40]),
        "top_logprobs_num": st.sampled_from([0, 2, -1, 1 << 20]),
        "stream": st.booleans(),
        "max_dynamic_patch": odd,
        "priority": odd,
        "extra_key": odd,
        "mm_content_hashes": odd,
    }
    wild = st.fixed_dictionaries({"sampling_params": sampling()}, optional=fields)
    harmless = {name: fields[name] for name in ("return_logprob", "stream", "modalities", "mm_hashes", "extra_key")}
    near = st.builds(
        lambda base, more: {"sampling_params": {"max_new_tokens": 2, "temperature": 0}, **base, **more},
        st.one_of(fitting, prompts().map(lambda words: {"text": words})),
        st.one_of(
            st.fixed_dictionaries({}, optional=harmless),
            *(st.fixed_dictionaries({name: value}) for name, value in fields.items() if name != "input_ids"),
        ),
    )
    return st.one_of(near, near, wild)


def parts(picture: str, film: str, wrong: bool = True) -> st.SearchStrategy[Any]:
    """Parts of a chat message; only right ones if `wrong` is False."""
    name = files(picture, film)
    url = st.one_of(
        name.map(lambda one: {"url": one}),
        st.fixed_dictionaries(
            {"url": st.one_of(name, odd)},
            optional={"detail": odd, "fps": odd, "max_frames": odd, "max_dynamic_patch": odd, "modality": odd},
        ),
        name,
        odd,
    )
    kinds = st.sampled_from(["image_url", "video_url", "text", "audio_url", "input_image", "file", "smell", None, 3])
    words = st.sampled_from(["What?", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "", "\x00"])
    right = st.sampled_from(
        [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "video_url", "video_url": {"url": film}},
        ]
    )
    if not wrong:
        return right
    odd_part = st.fixed_dictionaries(
        {"type": kinds},
        optional={"text": st.one_of(words, odd), "image_url": url, "video_url": url, "audio_url": url, "colour": odd},
    )
    return st.one_of(right, right, right, odd_part)


def chat_bodies(picture: str, film: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of /v1/chat/completions."""
    content = st.one_of(st.lists(parts(picture, film), max_size=4), st.sampled_from(["Hello", "<image>", ""]), odd)
    role = st.sampled_from(["user", "user", "user", "assistant", "system", "tool", "developer", "smell", None])
    right = st.lists(parts(picture, film, wrong=False), min_size=1, max_size=4).map(
        lambda found: {"role": "user", "content": found}
    )
    message = st.one_of(
        right,
        right,
        st.fixed_dictionaries({"role": role, "content": content}),
        st.fixed_dictionaries({"role": role}, optional={"content": content, "name": odd, "tool_call_id": odd}),
        odd,
    )
    return st.fixed_dictionaries(
        {
            "model": st.just("default"),
            "messages": st.one_of(
                st.lists(right, min_size=1, max_size=3), st.lists(message, min_size=1, max_size=4), odd
            ),
            "max_tokens": st.sampled_from([1, *[2] * 9, 0, -1, "x"]),
            "temperature": st.just(0),
        },
        optional={
            "stream": st.booleans(),
            "modalities": odd,
            "max_dynamic_patch": odd,
            "n": st.sampled_from([1, 2, 0]),
            "logprobs": st.booleans(),
            "session_params": odd,
            "mm_hashes": odd,
            "use_audio_in_video": odd,
            "stop": st.sampled_from(["a", ["a"], 3]),
        },
    )

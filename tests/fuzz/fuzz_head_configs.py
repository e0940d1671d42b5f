"""Files of head configs, right and wrong: each is refused with one sentence, or read as what it says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2Config

from sglang_mminfer import HeadConfig
from sglang_mminfer.head_config import Defaults, HeadConfigError, Provenance, fingerprint_of
from sglang_mminfer.head_config.provenance import LARGEST
from support import alone, any_pattern, conversation, heads

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 4),
    st.sampled_from(
        [LARGEST, LARGEST + 1, 1 << 62, 1 << 64, -(1 << 31), 1.0, 2.5, 1e300, -0.0, "", "1", "text", "row"]
    ),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.sampled_from(["kind", "sink", "all", "cycle"]), st.integers(0, 2), max_size=2),
)
KEYS = st.sampled_from(["kind", "sink", "local", "heads", "named", "all", "boundary", "text", "vision/text", "x", ""])

MODELS = [
    Qwen2_5_VLConfig(
        text_config={
            **{"num_hidden_layers": layers, "num_attention_heads": heads_, "num_key_value_heads": 1},
            **{"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128},
        },
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    for layers, heads_ in ((1, 1), (2, 2), (2, 4))
] + [Qwen2Config(architectures=["Qwen2ForCausalLM"], num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)]
MERGED = SimpleNamespace(
    **{"model_type": "videochat_flash", "vision_tokens_merged": True, "architectures": ["VideoChatFlash"]},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64},
)

FINGERPRINTS = st.sampled_from([None, None, *map(fingerprint_of, MODELS)])
FORMS = st.sampled_from(["all", "cycle", "layers"])
POOLS = st.lists(heads(any_pattern), min_size=1, max_size=3)
CHANGES = st.sampled_from([0, 1, 1, 1, 2, 3])
WHAT = st.sampled_from(["value", "value", "value", "gone", "double"])

CHAT = conversation(9, (3, 2, 3), 4, (1, 2, 2), 5)


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """The JSON of a config, right unless it was changed at up to three places."""
    model = draw(FINGERPRINTS)
    form = "layers" if model is not None else draw(FORMS)
    if form == "layers":
        layers, wide = (model.layers, model.heads) if model is not None else draw(st.sampled_from([(1, 1), (2, 2)]))
    else:
        layers, wide = 1, 1 if form == "all" else draw(st.integers(1, 3))
    pool = draw(POOLS)
    rows = tuple(tuple(draw(st.sampled_from(pool)) for _ in range(wide)) for _ in range(layers))
    config = HeadConfig(
        "drawn",
        Provenance("handwritten", "Drawn."),
        form,
        rows,
        model,
        Defaults(draw(st.sampled_from([0, 0, 7, LARGEST]))),
    )
    document = json.loads(config.to_json())
    for _ in range(draw(CHANGES)):
        change(draw, document)
    return document


def change(draw: st.DrawFn, document: Any) -> None:
    """Changes a document at one place: another value, a key more or fewer."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and draw(st.integers(0, 4)):
            place = place[key]
            continue
        what = draw(WHAT)
        if what == "gone":
            del place[key]
            return
        if what == "value":
            place[key] = draw(ODD)
            return
        break
    if isinstance(place, dict):
        place[draw(KEYS)] = draw(ODD)
    else:
        place.append(draw(ODD))


@st.composite
def cases(draw: st.DrawFn) -> tuple[bytes, int]:
    """The bytes of a file, and the model that it is bound to."""
    text = json.dumps(draw(documents()), ensure_ascii=draw(st.booleans()), allow_nan=True)
    content = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 5)) == 0:  # bytes that are no JSON, or none of ours
        at = draw(st.integers(0, len(content)))
        put = draw(
            st.sampled_from([b"", b"\xff", b"\x00", b"{", b"]", b",", b'"', b"9", b"1e999", b"NaN", b"\xef\xbb\xbf"])
        )
        content = content[:at] + put + content[at + draw(st.integers(0, 3)) :]
    return content, draw(st.integers(0, len(MODELS)))


def check(case: tuple[bytes, int]) -> str:
    content, model = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.json"
        path.write_bytes(content)
        try:
            config = HeadConfig.load(path)
        except HeadConfigError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 3000, str(error)
            return "refused"
        written = config.to_json()
        again = HeadConfig.from_json(written, config.name)
        assert (again.rows, again.form, again.model) == (config.rows, config.form, config.model)
        assert (again.provenance, again.defaults) == (config.provenance, config.defaults)
        assert again.to_json() == written
        assert_within(resolved(json.loads(content)), resolved(json.loads(written)), "")
    for head in config.rows[-1][-1:]:
        batch = alone(CHAT, head, dense_below=config.defaults.dense_below)
        wrapper = batch.planned()
        batch.run(wrapper)
        assert not (batch.exact_mask(0, 0) & ~wrapper.visited_mask(0, 0)).any(), head
    try:
        bound = config.bind(MERGED if model == len(MODELS) else MODELS[model])
    except HeadConfigError as error:
        assert "\n" not in str(error), str(error)
        return "for another model"
    assert bound.num_layers is not None and all(len(row) == bound.num_heads for row in bound.layers)
    return "read"


def resolved(document: Any) -> Any:
    """A document with every head that has a name in its place. A key with its default may be left out of a file."""
    named, given = document.get("named", {}), document["heads"]
    if isinstance(given, list):
        given = [[named[head] if isinstance(head, str) else head for head in row] for row in given]
    elif "cycle" in given:
        given = {"cycle": [named[head] if isinstance(head, str) else head for head in given["cycle"]]}
    elif isinstance(given["all"], str):
        given = {"all": named[given["all"]]}
    return {**{key: value for key, value in document.items() if key != "named" and value is not None}, "heads": given}


def assert_within(given: Any, read: Any, place: str) -> None:
    """Asserts that all that a file says was read, with its type."""
    if isinstance(given, dict):
        assert isinstance(read, dict), place
        for key, value in given.items():
            if value is not None:  # null says nothing
                assert key in read or (place.startswith("/provenance") and value is None), f"{place}/{key}"
                assert_within(value, read[key], f"{place}/{key}")
    elif isinstance(given, list):
        assert isinstance(read, list) and len(read) == len(given), place
        for i, (one, other) in enumerate(zip(given, read)):
            assert_within(one, other, f"{place}[{i}]")
    else:
        same_kind = isinstance(given, bool) == isinstance(read, bool)
        assert same_kind and given == read, f"{place}: {given!r} was read as {read!r}"


torch.set_grad_enabled(False)

"""Head configs: each mistake gets one clear error that names the file and the place; good ones round-trip."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2Config, Qwen2VLConfig, Qwen3_5Config

import config_files
from config_files import config_file
from sglang_mminfer import (
    Adaptive,
    AShape,
    Boundary2D,
    Dense,
    Grid,
    HeadConfig,
    Modality,
    PooledBlocks,
    PooledQueries,
    QBoundary,
    TriShape,
    VerticalSlash,
)
from sglang_mminfer.head_config import (
    Defaults,
    HeadConfigError,
    ModelFingerprint,
    Provenance,
    fingerprint_of,
)
from sglang_mminfer.patterns.base import kinds
from support import patterns_of_kind

PACKAGED = sorted((Path(__file__).resolve().parents[3] / "head_configs").glob("*.json"))
OF_TESTS = sorted(config_files.FOLDER.glob("*.json"))
MIXED = Path(config_file("test_mixed_heads")).read_text(encoding="utf-8")
BY_HAND = Provenance("handwritten", "of a test")
A = {"boundary": "none", "pattern": {"kind": "a_shape", "sink": 4, "local": 8}}
TINY = {
    "architecture": "Qwen2_5_VLForConditionalGeneration",
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "rope_theta": 1e6,
}


def tiny_model(**changes):
    text = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 128,
        **changes,
    }
    return Qwen2_5_VLConfig(text_config=text, architectures=["Qwen2_5_VLForConditionalGeneration"])


def document(**changes):
    """A small valid config, with top-level keys replaced (or removed, by ...)."""
    base = {
        "schema": 1,
        "model": None,
        "provenance": {"how": "handwritten", "note": "of a test"},
        "heads": {"all": A},
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def grid(**changes):
    return {"kind": "grid", "stride": "frame", "v": True, "h": True, "s": True, "phase": 0} | {
        "sink": 4,
        "local": 8,
        **changes,
    }


def one(pattern):
    return {"all": {"boundary": "none", "pattern": pattern}}


def write(tmp_path, content, name="my.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


# What is in the package


@pytest.mark.parametrize("path", [*PACKAGED, *OF_TESTS], ids=lambda path: path.stem)
def test_our_configs_load_and_are_written_as_to_json_would(path):
    name = path.stem
    config = HeadConfig.load(path)
    assert (config.name, config.schema, config.model) == (name, 1, None)
    assert Path(config.path) == path
    assert config.provenance.how == "handwritten" and "no search produced it" in config.provenance.note
    assert config.to_json() == path.read_text(encoding="utf-8")
    assert (path in PACKAGED) == (name in HeadConfig.available())
    assert path not in PACKAGED or HeadConfig.load(name) == config
    bound = config.bind(tiny_model())
    assert [len(bound.patterns(layer)) for layer in range(2)] == [4, 4]
    assert bound.is_dense(0) == (name == "dense")


def test_every_pattern_and_boundary_has_a_test_config():
    kinds = {type(p) for path in OF_TESTS for row in HeadConfig.load(path).rows for p in row}
    estimated = {Adaptive, VerticalSlash, PooledBlocks, PooledQueries}
    assert kinds == {Dense, AShape, TriShape, Grid, *estimated, QBoundary, Boundary2D}


def test_the_default_chooses_keys_in_any_model():
    config = HeadConfig.load("default")
    assert config.patterns(0) == [Adaptive(64, 256, 8, 0.01)] and config.model is None
    assert config.describe() == (
        "default (any model, handwritten): all heads adaptive(sink 64, local 256, rank 8, alpha 0.01, budget 0.5, "
        "text all); no basis: by q . k"
    )


def test_the_default_of_before_is_still_there():
    config = HeadConfig.load("grid_static")
    assert config.patterns(0) == [Grid("frame", True, True, True, 0, 128, 1024)]
    assert config.defaults == Defaults(4608) and config.describe().endswith("rows below 4608 dense")


def test_a_user_chooses_among_three_and_the_baselines():
    available = [name for name in HeadConfig.available() if not name.startswith("baseline_")]
    assert available == ["default", "dense", "grid_static"]


# Names and paths


@pytest.mark.parametrize("name", ["defualt", "", "..", "README", "default\n", "__init__", "a" * 5000])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(HeadConfigError, match=r"no built-in config has this name; available: .*default, dense"):
        HeadConfig.load(name)


def test_paths(tmp_path, monkeypatch):
    path = write(tmp_path, document())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path, str(path), "my.json", "./my.json", "~/my.json"):
        config = HeadConfig.load(name)
        assert config.name == "my" and config.patterns(7) == [AShape(4, 8)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("folder", "expected a file, this is a directory"),
        (b"\xff\xfe{}", "not UTF-8 text: invalid start byte at byte 0"),
        (b"", "not valid JSON: line 1, column 1: Expecting value"),
        (json.dumps(document(), indent=1).encode()[:-9], "not valid JSON: line "),
        (b'{"schema": 1,}', "not valid JSON: line 1, column 1"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b'{"schema": 1, "schema": 1}', 'key "schema" stands twice in one object'),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b'{"te\\ud800t": 1}', "expected Unicode text, got '\\ud800'"),
        (
            json.dumps(document(model=TINY)).replace("1000000.0", "1e999").encode(),
            "model.rope_theta: expected a number",
        ),
        (b"[]", "expected an object, got a list"),
        (b"{}", 'missing key "schema"'),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "my.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(HeadConfigError) as caught:
        HeadConfig.load(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = write(tmp_path, document())
    path.chmod(0)
    with pytest.raises(HeadConfigError, match="cannot be read"):
        HeadConfig.load(path)


# What is wrong inside


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2, "new": 1}, "schema: expected 1, got 2"),
        ({"heads": [["\n"]]}, 'no head is named "\\n"'),
        ({"named": {"\n": 3}}, "named.\\n: expected an object"),
        ({"schema": "1"}, 'schema: expected 1, got "1"'),
        ({"schema": True}, "schema: expected an integer, got true or false"),
        ({"heads": ...}, 'missing key "heads"'),
        ({"model": ...}, 'missing key "model"'),
        ({"provenance": ...}, 'missing key "provenance"'),
        ({"head": 1}, 'unknown key "head"'),
        ({"provenance": {"how": "guess", "note": "x"}}, "provenance.how: expected one of handwritten, s"),
        ({"provenance": {"how": "handwritten"}}, 'provenance: missing key "note"'),
        ({"provenance": {"how": "handwritten", "note": " "}}, "provenance.note: expected some words"),
        ({"provenance": {"how": "search", "note": "x"}}, "provenance.calibration: expected a value"),
        ({"provenance": {"how": "handwritten", "note": "x", "date": "20.11."}}, "provenance.date: expected "),
        ({"defaults": {"dense_below": -1}}, "defaults.dense_below: expected an integer of 0 .. 214748364"),
        ({"defaults": {"dense_bellow": 1}}, 'defaults: unknown key "dense_bellow"'),
        ({"model": TINY | {"layers": 0}}, "model.layers: expected an integer >= 1, got 0"),
        ({"model": TINY | {"kv_heads": 3}}, "model.kv_heads: expected a divisor of 4 heads, got 3"),
        ({"model": TINY | {"rope_theta": -1.0}}, "model.rope_theta: expected a number above 0, got -1.0"),
        ({"model": TINY | {"heads": "4"}}, "model.heads: expected an integer, got a string"),
        ({"model": {"layers": 2}}, 'model: missing key "architecture"'),
        ({"heads": {}}, 'heads: expected {"all": head}, {"cycle": [heads]} or a list of layers, got the'),
        ({"heads": {"all": A, "cycle": [A]}}, "got the keys all, cycle"),
        ({"heads": 3}, "or a list of layers, got a number"),
        ({"heads": []}, "heads: expected at least one head, got none"),
        ({"heads": [[]]}, "heads: expected at least one head, got none"),
        ({"heads": {"cycle": []}}, "heads: expected at least one head, got none"),
        ({"heads": {"cycle": {}}}, "heads.cycle: expected a list of heads, got an object"),
        ({"heads": [[A], A]}, "heads[1]: expected a list of heads (one layer), got an object"),
        ({"heads": [[A, A], [A]]}, "heads[1]: expected 2 heads as in heads[0], got 1"),
        ({"heads": [[A] * 4], "model": TINY}, "heads: expected 2 layers as in the fingerprint in `model`"),
        ({"heads": [[A]] * 2, "model": TINY}, "heads[0]: expected 4 heads as in the fingerprint"),
        ({"heads": [[A], [3]]}, "heads[1][0]: expected an object, got an integer"),
        ({"heads": {"all": {"pattern": A["pattern"]}}}, 'heads.all: missing key "boundary"'),
        ({"heads": {"all": A | {"boundary": "k"}}}, "heads.all.boundary: expected one of none, q, 2d"),
        ({"heads": {"all": A | {"patterns": {}}}}, 'heads.all: unknown key "patterns"'),
        ({"heads": {"all": A | {"boundary": "q"}}}, 'heads.all: unknown key "pattern"'),
        ({"heads": one({"kind": "b_shape"})}, "heads.all.pattern.kind: expected one of dense, a_shape"),
        ({"heads": one({"sink": 1})}, 'heads.all.pattern: missing key "kind"'),
        ({"heads": one({"kind": "dense", "sink": 1})}, 'heads.all.pattern: unknown key "sink"'),
        ({"heads": one({"kind": "a_shape", "sink": 1})}, 'heads.all.pattern: missing key "local"'),
        ({"heads": one({"kind": "a_shape", "sink": -1, "local": 1})},
         "heads.all.pattern.sink: expected an integer >= 0, got -1"),
        ({"heads": one({"kind": "a_shape", "sink": 1, "local": 0})},
         "heads.all.pattern.local: expected an integer >= 1, got 0"),
        ({"heads": one({"kind": "a_shape", "sink": 2**31, "local": 1})},
         "heads.all.pattern.sink: expected an integer <= 2147483647, got 2147483648"),
        ({"heads": one({"kind": "a_shape", "sink": 10**40, "local": 1})}, "heads.all.pattern.sink: "),
        ({"heads": one({"kind": "a_shape", "sink": 1.5, "local": 1})},
         "heads.all.pattern.sink: expected an integer, got a number"),
        ({"heads": one({"kind": "a_shape", "sink": True, "local": 1})},
         "heads.all.pattern.sink: expected an integer, got true or false"),
        ({"heads": one(grid(stride="column"))}, "heads.all.pattern.stride: expected one of frame, row"),
        ({"heads": one(grid(v=1))}, "heads.all.pattern.v: expected true or false, got an integer"),
        ({"heads": [[A, A], [A, one(grid(phase=-2))["all"]]]},
         "heads[1][1].pattern.phase: expected an integer >= 0, got -2"),
        ({"heads": {"cycle": [A, one(grid(phase=None))["all"]]}},
         "heads.cycle[1].pattern.phase: expected an integer, got null"),
        ({"heads": {"all": {"boundary": "q", "patterns": {}}}},
         "heads.all.patterns: expected at least one pattern, got none"),
        ({"heads": {"all": {"boundary": "q", "patterns": {"audio": A["pattern"]}}}},
         'heads.all.patterns: unknown key "audio"'),
        ({"heads": {"all": {"boundary": "q", "patterns": {"video": grid(local=0)}}}},
         "heads.all.patterns.video.local: expected an integer >= 1, got 0"),
        ({"heads": {"all": {"boundary": "q", "patterns": {"video": grid(), "vision": grid()}}}},
         'heads.all.patterns: "video" and "vision" overlap'),
        ({"heads": {"all": {"boundary": "2d", "patterns": {"video": grid()}}}},
         'heads.all.patterns: unknown key "video"'),
        ({"heads": {"all": {"boundary": "2d", "patterns": {"video/text": grid(sink="4")}}}},
         "heads.all.patterns.video/text.sink: expected an integer, got a string"),
        ({"heads": {"all": {"boundary": "2d", "patterns": {"vision/image": grid(), "video/vision": grid()}}}},
         'heads.all.patterns: "video/vision" and "vision/image" overlap, so that one head has two patterns'),
        ({"heads": {"all": "a"}}, 'heads.all: no head is named "a"; named: none'),
        ({"heads": [["b"]], "named": {"a": A}}, 'heads[0][0]: no head is named "b"; named: a'),
        ({"named": {"a": "a"}}, "named.a: expected an object, got a string"),
        ({"named": {"a": one(grid(local=0))["all"]}}, "named.a.pattern.local: expected an integer >= 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(tmp_path, changes, words):
    path = write(tmp_path, document(**changes))
    with pytest.raises(HeadConfigError) as caught:
        HeadConfig.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value)[len(str(path)) + 2 :].startswith(words) or words in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_truncation_is_an_error_and_nothing_else(data):
    text = MIXED.rstrip()
    with pytest.raises(HeadConfigError):
        HeadConfig.from_json(text[: data.draw(st.integers(0, len(text) - 1))])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_json_at_any_place_is_read_or_refused(data):
    """Whatever replaces a value in a file: a config or a HeadConfigError, never another exception."""
    doc = json.loads(MIXED)
    node = doc
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    node[key] = data.draw(
        st.recursive(scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s))
    )
    try:
        HeadConfig.from_json(json.dumps(doc))
    except HeadConfigError as error:
        assert str(error).startswith('head config "unnamed": ')


# Models


def test_fingerprints_of_real_configs():
    assert fingerprint_of(tiny_model()) == ModelFingerprint(**TINY)
    flat = Qwen2Config(architectures=["Qwen2ForCausalLM"], head_dim=256, rope_theta=5e5)
    found = fingerprint_of(flat)
    assert (found.architecture, found.layers, found.head_dim, found.rope_theta) == (
        "Qwen2ForCausalLM",
        32,
        256,
        5e5,
    )
    assert fingerprint_of(Qwen2VLConfig()).kv_heads == 8
    by_layer = SimpleNamespace(
        model_type="mixed",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        rope_parameters={"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 8.0}},
    )
    assert fingerprint_of(by_layer) == ModelFingerprint("mixed", 1, 2, 2, 4, 8, 7.0)
    with pytest.raises(HeadConfigError, match="num_attention_heads"):
        fingerprint_of(SimpleNamespace(model_type="other"))


def test_the_fingerprint_of_an_original_llava_is_the_same_once_sglang_has_made_the_model():
    config = Qwen2Config(
        architectures=["LlavaQwenForCausalLM"], num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3
    )
    before = fingerprint_of(config)
    config.text_config = Qwen2Config()  # as LlavaQwenForCausalLM does
    assert fingerprint_of(config) == before and (before.heads, before.layers) == (8, 3)


def test_the_right_model_passes(tmp_path):
    config = HeadConfig.load(write(tmp_path, document(model=TINY, heads=[[A] * 4] * 2)))
    config.check_model(tiny_model())
    bound = config.bind(tiny_model())
    assert (bound.num_layers, bound.num_heads) == (2, 4)
    assert bound.patterns(1) == [AShape(4, 8)] * 4


def test_the_wrong_model_is_refused_with_every_difference(tmp_path):
    path = write(tmp_path, document(model=TINY))
    model = tiny_model(num_hidden_layers=3, num_key_value_heads=4, rope_parameters={"rope_theta": 1e4})
    model.architectures = ["Qwen2VLForConditionalGeneration"]
    with pytest.raises(HeadConfigError) as caught:
        HeadConfig.load(path).check_model(model)
    assert str(caught.value) == (
        f"{path}: model: was made for another model: architecture "
        "(config Qwen2_5_VLForConditionalGeneration, model Qwen2VLForConditionalGeneration), "
        "layers (config 2, model 3), kv_heads (config 2, model 4), "
        "rope_theta (config 1000000.0, model 10000.0)"
    )


def test_a_list_must_fit_the_model_even_without_a_fingerprint():
    config = HeadConfig.from_json(json.dumps(document(heads=[[A] * 4] * 3)), "short")
    words = r'head config "short": heads: expected 2 layers as in the model, got 3'
    with pytest.raises(HeadConfigError, match=words):
        config.bind(tiny_model())
    config = HeadConfig.from_json(json.dumps(document(heads=[[A] * 2] * 2)))
    with pytest.raises(HeadConfigError, match=r"heads\[0\]: expected 4 heads as in the model, got 2"):
        config.check_model(tiny_model())


@pytest.mark.parametrize(
    ("heads", "where"),
    [
        (config_file("test_grid_row"), r"heads\.all"),
        (config_file("test_mixed_heads"), r"heads\.cycle\[\d+\]"),
    ],
)
def test_columns_are_refused_where_tokens_are_merged(heads, where):
    """A model without rows and columns takes grids of the frame stride only."""
    model = tiny_model()
    config = HeadConfig.load(heads)
    config.bind(model)
    model.model_type, model.vision_tokens_merged = "videochat_flash", True
    with pytest.raises(HeadConfigError, match=where + r': a grid of stride "row" needs columns'):
        config.bind(model)
    HeadConfig.load("default").bind(model)
    HeadConfig.load(config_file("test_grid_frame")).bind(model)


# Asking


def test_patterns_of_each_form():
    a, b, c = AShape(1, 2), Dense(), TriShape(1, 2, 3)
    one_head = HeadConfig("x", BY_HAND, "all", ((a,),))
    assert one_head.patterns(5) == [a] and one_head.patterns(5, num_heads=3) == [a] * 3
    cycle = HeadConfig("x", BY_HAND, "cycle", ((a, b, c),))
    assert cycle.patterns(0, 4) == [a, b, c, a] and cycle.patterns(2, 4) == [c, a, b, c]
    with pytest.raises(HeadConfigError, match="bind the config to a model first"):
        cycle.patterns(0)
    assert cycle.bind(tiny_model()).patterns(1) == [b, c, a, b]
    layers = HeadConfig("x", BY_HAND, "layers", ((a, b), (b, b)))
    assert layers.patterns(0) == [a, b] and [layers.is_dense(i) for i in range(2)] == [False, True]
    with pytest.raises(HeadConfigError, match="has 2 heads, asked for 4"):
        layers.patterns(0, 4)
    for config, layer in ((layers, 2), (layers, -1), (layers, "0"), (cycle.bind(tiny_model()), 2)):
        with pytest.raises(HeadConfigError, match=r"expected a layer of 0 .. 1, asked for layer"):
            config.patterns(layer)
    all_dense = HeadConfig("x", BY_HAND, "all", ((QBoundary({Modality.TEXT: Dense()}),),))
    assert all_dense.is_dense(0)


def test_what_is_returned_may_be_changed():
    config = HeadConfig("x", BY_HAND, "layers", ((Dense(), Dense()),))
    config.patterns(0).clear()
    assert len(config.patterns(0)) == 2


def test_names_stand_for_heads():
    text = json.dumps(document(named={"a": A, "unused": A}, heads=[["a", one({"kind": "dense"})["all"]]]))
    assert HeadConfig.from_json(text).patterns(0) == [AShape(4, 8), Dense()]


# Round trip

plain = st.one_of([patterns_of_kind(cls, scale=2**31 - 1) for cls in kinds().values()])
queries = st.sampled_from([("text",), ("image", "video"), ("vision",), ("text", "vision"), ("text", "image", "video")])


@st.composite
def boundaries(draw):
    rows = draw(queries)
    if draw(st.booleans()):
        return QBoundary({Modality(q): draw(plain) for q in rows})
    return Boundary2D({(Modality(q), Modality(k)): draw(plain) for q in rows for k in draw(queries)})


heads = plain | boundaries()
json_values = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4)
provenances = st.builds(
    Provenance,
    st.just("handwritten"),
    st.text(min_size=1).filter(str.strip),
    budget=st.none() | st.text(),
    date=st.none() | st.dates().map(str),
    details=st.none() | st.dictionaries(st.text(), json_values, max_size=2),
) | st.builds(Provenance, st.just("search"), st.just("n"), st.just("c"), st.just("b"), st.just("2026-11-20"))


@st.composite
def configs(draw):
    form = draw(st.sampled_from(["all", "cycle", "layers"]))
    width = 1 if form == "all" else draw(st.integers(1, 4))
    height = draw(st.integers(1, 3)) if form == "layers" else 1
    pool = draw(st.lists(heads, min_size=1, max_size=4))
    rows = tuple(tuple(draw(st.sampled_from(pool)) for _ in range(width)) for _ in range(height))
    model = draw(st.none() | st.just(ModelFingerprint("X", height, width, width, 8, 8 * width, 1e4)))
    defaults = Defaults(draw(st.integers(0, 2**31 - 1)))
    return HeadConfig("unnamed", draw(provenances), form, rows, model, defaults)


@settings(max_examples=200, deadline=None)
@given(configs())
def test_what_is_written_reads_back_as_the_same(config):
    text = config.to_json()
    again = HeadConfig.from_json(text)
    assert again == config
    assert HeadConfig.from_json(again.to_json()) == config
    assert "\n" not in config.describe()


def test_a_whole_model_stays_readable():
    pool = [Grid("frame", True, True, True, i, 64, 512) for i in range(20)] + [Dense()]
    rows = tuple(tuple(pool[(3 * layer + h) % 21] for h in range(28)) for layer in range(28))
    model = ModelFingerprint("Qwen2_5_VLForConditionalGeneration", 28, 28, 4, 128, 3584, 1e6)
    config = HeadConfig("unnamed", BY_HAND, "layers", rows, model)
    lines = config.to_json().splitlines()
    assert len(lines) < 70 and max(map(len, lines)) < 400
    assert HeadConfig.from_json(config.to_json()) == config
    assert config.describe().startswith(
        "unnamed (Qwen2_5_VLForConditionalGeneration, handwritten): 28 x 28 heads, 21 distinct, the first g"
    )


def test_a_config_made_in_code_is_checked_too():
    with pytest.raises(HeadConfigError, match=r"heads\[1\]: expected 2 heads"):
        HeadConfig("x", BY_HAND, "layers", ((Dense(), Dense()), (Dense(),)))
    with pytest.raises(HeadConfigError, match="expected one row of heads, got 2"):
        HeadConfig("x", BY_HAND, "cycle", ((Dense(),), (Dense(),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        HeadConfig.load("dense").name = "other"


# Models in which some layers have a recurrent state instead of attention


def hybrid():
    """4 layers, of which 1 and 3 have attention."""
    text = {
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [2, 1, 1]},
    }
    return Qwen3_5Config(text_config=text, architectures=["Qwen3_5ForConditionalGeneration"])


HYBRID = ModelFingerprint("Qwen3_5ForConditionalGeneration", 4, 4, 2, 32, 64, 1e7, (1, 3))


def test_the_layers_that_have_attention_belong_to_the_fingerprint():
    from sglang.srt.configs.qwen3_5 import Qwen3_5Config as SGLangConfig

    of_sglang = SGLangConfig(**hybrid().to_dict())
    assert fingerprint_of(hybrid()) == fingerprint_of(of_sglang) == HYBRID
    assert list(HYBRID.attention_layers) == [1, 3] and list(ModelFingerprint(**TINY).attention_layers) == [0, 1]
    assert HYBRID.in_all_layers([["a", "b"], ["c"]]) == ((), ("a", "b"), (), ("c",))
    with pytest.raises(ValueError, match="zip"):
        HYBRID.in_all_layers([["a"]])
    for wrong in ((), (1, 1), (3, 1), (-1,), (4,)):
        with pytest.raises(ValueError, match=r"full_layers: expected ascending layers of 0 \.\. 3"):
            ModelFingerprint(**TINY | {"layers": 4}, full_layers=wrong)


@pytest.mark.parametrize(
    "heads", [{"all": A}, {"cycle": [A]}, [[], [A] * 4, [], [A] * 4]], ids=["all", "cycle", "layers"]
)
def test_layers_without_attention_have_no_heads(heads):
    bound = HeadConfig.from_json(json.dumps(document(heads=heads))).bind(hybrid())
    assert bound.layers == [[], [AShape(4, 8)] * 4, [], [AShape(4, 8)] * 4]
    assert bound.is_dense(0) and not bound.is_dense(1) and not bound.all_dense
    denser = bound.with_dense([(3, 2)])
    assert denser.layers == [[], bound.patterns(1), [], [AShape(4, 8), AShape(4, 8), Dense(), AShape(4, 8)]]
    again = HeadConfig.from_json(denser.to_json()).bind(hybrid())
    assert again.layers == denser.layers


def test_a_config_for_a_hybrid_model_names_its_layers(tmp_path):
    rows = ((), (AShape(4, 8),) * 4, (), (Dense(),) * 4)
    config = HeadConfig("x", BY_HAND, "layers", rows, HYBRID)
    config.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["model"]["full_layers"] == [1, 3]
    again = HeadConfig.load(tmp_path / "x.json")
    assert (again.rows, again.model) == (rows, HYBRID)
    assert again.bind(hybrid()).layers == list(map(list, rows))
    assert "2 x 4 heads" in again.describe()
    with pytest.raises(HeadConfigError, match=r"full_layers \(config \(1, 3\), model None\)"):
        again.check_model(tiny_model(num_hidden_layers=4))
    assert "full_layers" not in HeadConfig("x", BY_HAND, "all", ((Dense(),),), ModelFingerprint(**TINY)).to_json()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[A] * 4] * 4, r"heads\[0\]: expected 0 heads as in the model, where this layer has no attention, got 4"),
        ([[], [], [], [A] * 4], r"heads\[1\]: expected 4 heads as in the model, got 0"),
        ([[], [A] * 3, [], [A] * 4], r"heads\[3\]: expected 3 heads as in heads\[1\], got 4"),
        ([[A] * 4] * 2, r"heads: expected 4 layers as in the model, got 2"),
        ([[], [], [], []], "expected at least one head, got none"),
    ],
)
def test_rows_that_do_not_fit_a_hybrid_model(rows, words):
    with pytest.raises(HeadConfigError, match=words):
        HeadConfig.from_json(json.dumps(document(heads=rows))).bind(hybrid())


def test_an_empty_layer_is_wrong_where_all_have_attention():
    with pytest.raises(HeadConfigError, match=r"heads\[1\]: expected 4 heads as in the model, got 0"):
        HeadConfig.from_json(json.dumps(document(heads=[[A] * 4, []]))).bind(tiny_model())

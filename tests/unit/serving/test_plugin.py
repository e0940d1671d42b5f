"""The plugin as SGLang uses it: registration, flags and their precedence, refusals, and the media hooks.

Nothing of SGLang is replaced here. Models are directories with a config.json and no weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from config_files import config_file
from sglang_mminfer import mends, plugin, releases, settings
from sglang_mminfer.families.qwen_vl.processor import videos_of
from sglang_mminfer.head_config import HeadConfig, HeadConfigError, ModelBasis, Provenance, fingerprint_of
from sglang_mminfer.serving import backend_entry, basis_choice, dense_backend, flags, head_config_choice, hooks, launch
from sglang_mminfer.serving.hooks import Hook
from sglang_mminfer.tools.media import make_video
from sglang_versions import skip_before

load_plugins()

DENSE_CONFIG = Path(__file__).parents[3] / "head_configs" / "dense.json"

CHOOSES_BY_A_BASIS = config_file("test_covering_mixed")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "vision": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": TEXT
        | {
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    },
    "text": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | TEXT,
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    }
    | TEXT,
    "linear_attention": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "head_dim": 16,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_ssm": 128,
    }
    | TEXT,
    "delta_nets": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": TEXT
        | {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,
            "full_attention_interval": 4,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_5",
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "encoder_decoder": {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "text_config": TEXT | {"model_type": "mllama_text_model", "num_hidden_layers": 2, "cross_attention_layers": []},
        "vision_config": {"model_type": "mllama_vision_model"},
    },
    "gemma4": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": TEXT | {"model_type": "gemma4_text", "layer_types": ["sliding_attention", "full_attention"]},
    },
    "llama4": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": TEXT | {"model_type": "llama4_text"},
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": TEXT | {"model_type": "gemma3_text"},
    },
    "exaone4": {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "sliding_window_pattern": 4} | TEXT,
    "own_sparse_attention": {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "llama",
    }
    | TEXT,
}

INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 1024,
    "indexer_compress_ratio": 2,
}
MODELS["delta_nets_and_indexer"] = MODELS["delta_nets"] | {"text_config": MODELS["delta_nets"]["text_config"] | INDEXER}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, content in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(content))
    return {name: str(root / name) for name in MODELS}


def arguments(models: dict[str, str], model: str = "vision", **fields: Any) -> ServerArgs:
    fields.setdefault("attention_backend", "mminfer")
    return ServerArgs(model_path=models[model], **fields)


# Registration


def test_import_is_light() -> None:
    code = (
        "import sys, sglang_mminfer.plugin; print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_sglang_knows_the_backend() -> None:
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, DRAFT_ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    assert ATTENTION_BACKENDS["mminfer"] is backend_entry.create_backend
    assert ATTENTION_BACKEND_CHOICES.count("mminfer") == 1
    assert "mminfer" not in DRAFT_ATTENTION_BACKEND_CHOICES  # a head config is not for a draft model's heads


def test_registering_again_changes_nothing() -> None:
    from sglang.srt.arg_groups import choices, resolution_hooks
    from sglang.srt.plugins.hook_registry import HookRegistry

    def state() -> tuple[Any, ...]:
        return (
            list(choices.ATTENTION_BACKEND_CHOICES),
            {target: len(hooks) for target, hooks in HookRegistry._hooks.items()},
            {step: len(hooks) for step, hooks in resolution_hooks._HOOKS.items()},
        )

    before = state()
    plugin.register()
    HookRegistry.apply_hooks()
    assert state() == before


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Registers the plugin with these hooks instead of its own, which it has back when the test ends."""
    with pytest.MonkeyPatch.context() as patch:

        def register(*its_hooks: Hook) -> None:
            patch.setattr(plugin, "HOOKS", its_hooks)
            plugin.register.cache_clear()
            plugin.register()

        yield register
    plugin.register.cache_clear()
    plugin.register()


def test_a_missing_target_costs_mminfer_alone(
    models: dict[str, str], register: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """If SGLang lacks a target, registration is silent, a launch with mminfer fails, and others do not notice."""
    gone = [
        Hook("sglang.srt.no.f", "around", "sglang_mminfer.serving.ffmpeg:decode_without_ffmpeg", "Why it is there."),
        Hook("handle_nothing", "resolution", "sglang_mminfer.serving.launch:check_launch", "A test.", essential=True),
    ]
    register(*gone)
    arguments(models, attention_backend="triton", device="cuda").resolve_once()
    assert "mminfer" not in caplog.text
    with pytest.raises(hooks.UnsupportedLaunch, match=r"has no handle_nothing, without which answers could be wrong"):
        arguments(models).resolve_once()
    assert "Why it is there" not in caplog.text
    register(gone[0])
    arguments(models, device="cpu").resolve_once()
    assert caplog.text.count("so this goes unmended: Why it is there.") == 1


def test_another_sglang_is_said_to_be_untested(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "TESTED_SGLANG", ">=0.5.24,<0.5.25")
    arguments(models, device="cpu").resolve_once()
    assert f"untested with SGLang {version('sglang')}" in caplog.text


def test_the_tested_versions_are_those_of_the_distribution() -> None:
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert f"sglang{settings.TESTED_SGLANG}" in pyproject["project"]["dependencies"]


def test_failure_is_loud(register: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """In one line, and it keeps no other hook from being installed."""
    target = "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS"
    broken = Hook(target, "backend", "sglang_mminfer.plugin:not_there", "A test.", essential=True, when=("load",))
    register(broken)
    (record,) = [record for record in caplog.records if "mminfer" in record.getMessage()]
    assert target in record.getMessage() and settings.TESTED_SGLANG in record.getMessage()
    with pytest.raises(hooks.UnsupportedLaunch, match="not_there"):
        hooks.check_installation()


def moved(server_args: Any, previous: Callable[[Any], None]) -> None:
    """A resolution hook that relies on what SGLang no longer has."""
    server_args.no_such_method()


def test_an_error_of_ours_ends_no_server_that_did_not_ask(
    models: dict[str, str], register: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    from sglang.srt.arg_groups import resolution_hooks

    kept = {step: list(functions) for step, functions in resolution_hooks._HOOKS.items()}
    monkeypatch.setattr(resolution_hooks, "_HOOKS", kept)
    monkeypatch.setattr(launch, "check_launch", moved)
    register(Hook("handle_model_source_paths", "resolution", f"{launch.__name__}:check_launch", "", when=("load",)))
    for _ in range(2):
        arguments(models, attention_backend="triton", device="cuda").resolve_once()
    assert caplog.text.count("a hook of mminfer failed and was passed by") == 1
    with pytest.raises(AttributeError, match="no_such_method"):
        arguments(models, device="cpu").resolve_once()


def test_a_hook_that_has_moved_is_installed_where_it_was() -> None:
    hook = Hook("json.no_such_place.dumps", "around", "x:y", "A test.", formerly="json.dumps")
    assert hook.target_exists()
    assert [place.target_exists() for place in hook.at_each_place()] == [False, True]


def test_another_selected_platform_hides_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang skips the whole distribution then; the doctor explains it."""
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, _get_excluded_dists, load_plugins_by_group

    monkeypatch.setenv("SGLANG_PLATFORM", "some_other")
    assert "mminfer" not in load_plugins_by_group(GENERAL_PLUGINS_GROUP, _get_excluded_dists())
    monkeypatch.setenv("SGLANG_PLATFORM", "mminfer_cpu")
    assert "mminfer" in load_plugins_by_group(GENERAL_PLUGINS_GROUP, _get_excluded_dists())


def test_help_of_the_server_lists_flag_and_choice() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--mminfer-config NAME|PATH" in out
    assert "--mminfer-audit RATE" in out
    assert "--mminfer-guard ERROR" in out
    backends = out[out.index("--attention-backend {") :]
    assert "mminfer" in backends[: backends.index("}")]


# The flags and their precedence


def parse(models: dict[str, str], *flags: str) -> ServerArgs:
    return prepare_server_args(["--model-path", models["vision"], "--attention-backend", "mminfer", *flags])


def test_flag_is_carried(models: dict[str, str]) -> None:
    assert head_config_choice.resolve(parse(models, "--mminfer-config", "dense")) == head_config_choice.ConfigChoice(
        "dense", "--mminfer-config"
    )
    assert head_config_choice.resolve(parse(models), environ={}).name == "default"


def test_flag_from_a_yaml_file(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("mminfer-config: dense\n")
    assert head_config_choice.resolve(parse(models, "--config", str(file))).name == "dense"


def test_a_launch_pins_a_config_of_the_hub_to_its_commit(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache as it lies on disk, offline; the branch moves between the launch and a rank's start."""
    from huggingface_hub import constants

    commit, repo = "c" * 40, tmp_path / "models--me--heads"
    for path, text in (("refs/main", commit), (f"snapshots/{commit}/deep/mine.json", DENSE_CONFIG.read_text())):
        (repo / path).parent.mkdir(parents=True)
        (repo / path).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server_args = parse(models, "--mminfer-config", "hf://me/heads/deep/mine.json", "--device", "cpu")
    server_args.resolve_once()
    (repo / "refs" / "main").write_text("d" * 40)
    config, choice = head_config_choice.load_for_model(server_args, model_config_of(server_args).hf_config)
    assert choice.name == config.path == f"hf://me/heads@{commit}/deep/mine.json"
    assert choice.name in head_config_choice.describe(config, choice, "torch_native", server_args)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ('{"schema": 1, "surprise": 2}', "surprise"),
    ],
    ids=["missing", "malformed", "unknown key"],
)
def test_bad_file_is_a_usage_error(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        parse(models, "--mminfer-config", str(path))
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "argument --mminfer-config" in last
    assert str(path) in last
    assert message in last


@pytest.mark.parametrize(
    "flag, environ, model, name, source",
    [
        ("a", "b", "c", "a", settings.CONFIG.flag),
        (None, "b", "c", "b", settings.CONFIG.variable),
        (None, None, "c", "c", "mminfer_config of the model config"),
        (None, None, None, "default", "built-in, as none was named"),
        ("", "", "", "default", "built-in, as none was named"),
    ],
)
def test_precedence(flag: str | None, environ: str | None, model: str | None, name: str, source: str) -> None:
    server_args = SimpleNamespace(**{flags.CONFIG_ATTRIBUTE: flag})
    choice = head_config_choice.resolve(
        server_args,
        SimpleNamespace(mminfer_config=model),
        {} if environ is None else {settings.CONFIG.variable: environ},
    )
    assert (choice.name, choice.source) == (name, source)


def test_model_config_that_names_no_name() -> None:
    with pytest.raises(HeadConfigError, match="expected a name or a path, got 3"):
        head_config_choice.resolve(SimpleNamespace(), SimpleNamespace(mminfer_config=3), {})


def test_override_reaches_the_model_config(models: dict[str, str]) -> None:
    server_args = arguments(models, json_model_override_args='{"mminfer_config": "dense"}')
    head_config, choice = head_config_choice.load_for_model(server_args, model_config_of(server_args).hf_config, {})
    assert (head_config.name, choice.name) == ("dense", "dense")
    assert head_config.num_layers == 2  # bound to the model


def _in_a_child(pickled: bytes, queue: Any) -> None:
    """Does what a scheduler process does: unpickles the arguments, loads plugins, uses the arguments."""
    server_args = pickle.loads(pickled)
    load_plugins()
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    view = resolving_view(server_args)
    queue.put(
        (head_config_choice.resolve(server_args), "mminfer" in ATTENTION_BACKENDS, view.attention_backend, view.device)
    )


def test_flag_survives_the_spawn_of_a_scheduler(models: dict[str, str]) -> None:
    server_args = parse(models, "--mminfer-config", "dense", "--device", "cpu")
    server_args.resolve_once()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(pickle.dumps(server_args), queue))
    child.start()
    child.join(300)
    assert child.exitcode == 0
    assert queue.get() == (head_config_choice.ConfigChoice("dense", settings.CONFIG.flag), True, "mminfer", "cpu")


def test_config_for_another_model_is_found_by_the_parent(models: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    content = json.loads(HeadConfig.load("dense").to_json())
    content["model"] = {
        "architecture": "Qwen2_5_VLForConditionalGeneration",
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "hidden_size": 3584,
        "rope_theta": 1e6,
    }
    path.write_text(json.dumps(content))
    server_args = parse(models, "--mminfer-config", str(path))
    with pytest.raises(HeadConfigError, match=r"--mminfer-config: .*made for another model: layers"):
        server_args.resolve_once()


def test_bad_environment_is_found_by_the_parent(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.CONFIG.variable, "no_such_config")
    with pytest.raises(HeadConfigError, match=r"^SGLANG_MMINFER_CONFIG: .*no_such_config"):
        arguments(models).resolve_once()


def test_description_names_what_matters() -> None:
    line = head_config_choice.describe(
        HeadConfig.load("default"), head_config_choice.ConfigChoice("default", "somewhere"), "fa3", None
    )
    assert "'default' (somewhere)" in line
    assert "fa3" in line
    assert "no search produced it" in line


@pytest.mark.parametrize(
    "fields, device, name",
    [
        ({"attention_backend": "mminfer"}, "cpu", "torch_native"),
        ({"attention_backend": None, "prefill_attention_backend": "mminfer"}, "cpu:0", "torch_native"),
        ({"attention_backend": "triton", "prefill_attention_backend": "mminfer"}, "cuda", "triton"),
    ],
)
def test_dense_backend(models: dict[str, str], fields: dict[str, Any], device: str, name: str) -> None:
    assert dense_backend.dense_backend_name(arguments(models, **fields), device) == name


@pytest.mark.parametrize(
    "default, page_size, expected, dense",
    [
        ("trtllm_mha", None, 64, "trtllm_mha"),  # as SGLang sets it for this name
        ("trtllm_mha", 32, 32, "trtllm_mha"),
        ("trtllm_mha", 8, 8, "flashinfer"),  # the user's page size, which trtllm_mha does not take
        ("fa4", None, 128, "fa4"),
        ("fa3", None, None, "fa3"),
        ("flashinfer", None, None, "flashinfer"),
    ],
)
def test_blackwell_keeps_its_dense_backend(
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    default: str,
    page_size: int | None,
    expected: int | None,
    dense: str,
) -> None:
    """Decoding and dense prefill use the backend, and the page size, that SGLang would use without mminfer."""
    from sglang.srt.arg_groups import model_override_base

    monkeypatch.setattr(model_override_base, "get_default_attn_backend", lambda *args: default)
    server_args = arguments(models, device="cuda", page_size=page_size)
    with caplog.at_level(logging.INFO, logger="sglang_mminfer"):
        launch.check_launch(server_args, lambda server_args: None)
    assert resolving_view(server_args).page_size == expected
    assert dense_backend.dense_backend_name(server_args, "cuda") == dense
    assert ("the page size is" in caplog.text) == (page_size is None and expected is not None)


@pytest.mark.parametrize("algorithm, topk", [("EAGLE3", 1), ("EAGLE3", 4), ("NEXTN", 1), ("DFLASH", None)])
def test_drafts_and_target_on_blackwell_run_where_sglang_would_run_them(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, algorithm: str, topk: int | None
) -> None:
    """SGLang's own choice depends on the page size, which it fixes after it has chosen; so do we."""
    from sglang.srt.arg_groups import model_override_base

    platform = SimpleNamespace(is_hopper_with_cuda_12_3=False, is_sm100=True, is_hip=False, has_flashinfer=True)
    monkeypatch.setattr(model_override_base, "get_platform", lambda: platform)
    monkeypatch.setattr(model_override_base.current_platform, "is_out_of_tree", lambda: False)
    fields = {"speculative_algorithm": algorithm, "speculative_eagle_topk": topk, "device": "cuda"}
    stock = arguments(models, attention_backend=None, **fields)
    model = model_override_base.model_config_of(stock)
    default = model_override_base.get_default_attn_backend(stock, False, model)
    if algorithm != "DFLASH":  # for which releases of SGLang choose another one
        assert default == ("flashinfer" if topk == 4 else "trtllm_mha")
    server_args = arguments(models, **fields)
    launch.check_launch(server_args, lambda server_args: None)
    shipped = pickle.loads(pickle.dumps(server_args))
    view = resolving_view(shipped)
    assert dense_backend.dense_backend_name(shipped, "cuda") == default == view.speculative_draft_attention_backend
    assert view.page_size == (64 if default == "trtllm_mha" else None)


def test_drafts_on_a_cpu_run_on_its_dense_backend(models: dict[str, str]) -> None:
    skip_before("0.5.23")
    server_args = arguments(models, device="cpu", speculative_algorithm="EAGLE3")
    launch.check_launch(server_args, lambda server_args: None)
    assert resolving_view(server_args).speculative_draft_attention_backend == "torch_native"


def test_a_cpu_without_mminfer_verifies_no_trees_either(models: dict[str, str]) -> None:
    skip_before("0.5.23")
    fields = {"attention_backend": "torch_native", "device": "cpu", "speculative_algorithm": "EAGLE3"}
    launch.check_launch(arguments(models, **fields), lambda server_args: None)
    with pytest.raises(hooks.UnsupportedLaunch, match="--speculative-eagle-topk 1"):
        launch.check_launch(arguments(models, **fields, speculative_eagle_topk=2), lambda server_args: None)


@pytest.mark.parametrize(
    "fields, page_size, dense",
    [
        ({}, 64, "trtllm_mha"),  # SGLang caches states in the other way then
        ({"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}, None, "triton"),
        ({"linear_attn_backend": "cutedsl"}, None, "triton"),
        ({"mamba_radix_cache_strategy": "no_buffer", "disable_radix_cache": True}, 64, "trtllm_mha"),
    ],
    ids=str,
)
def test_pages_of_a_hybrid_model_on_blackwell(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], page_size: int | None, dense: str
) -> None:
    """The way of caching recurrent states that takes pages of one token only is not given larger ones."""
    from sglang.srt.arg_groups import model_override_base

    monkeypatch.setattr(model_override_base, "get_default_attn_backend", lambda *args: "trtllm_mha")
    server_args = arguments(models, "delta_nets", device="cuda", **fields)
    launch.check_launch(server_args, lambda server_args: None)
    assert resolving_view(server_args).page_size == page_size
    assert dense_backend.dense_backend_name(server_args, "cuda") == dense


@pytest.mark.parametrize(
    "is_sm100, default, dense",
    [(True, "trtllm_mha", "trtllm_mha"), (True, "flashinfer", "triton"), (False, "fa3", "fa3")],
)
def test_the_dense_backend_of_a_hybrid_model_is_sglangs(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, is_sm100: bool, default: str, dense: str
) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import model_override_base

    monkeypatch.setattr(model_override_base, "get_default_attn_backend", lambda *args: default)
    monkeypatch.setattr(runtime_context, "get_platform", lambda: SimpleNamespace(is_sm100=is_sm100))
    server_args = arguments(models, "delta_nets", device="cuda", page_size=64)
    assert dense_backend.dense_backend_name(server_args, "cuda") == dense
    assert dense_backend.dense_backend_name(arguments(models, device="cuda", page_size=64), "cuda") == default


def test_sglang_sees_the_dense_backends_name_beside_delta_nets(models: dict[str, str]) -> None:
    server_args = arguments(models, "delta_nets", device="cpu")
    runner = SimpleNamespace(
        server_args=server_args,
        device="cpu",
        prefill_attention_backend_str="mminfer",
        decode_attention_backend_str="triton",
    )
    seen = []

    def names(runner: Any, full: Any) -> Any:
        seen.append((runner.prefill_attention_backend_str, runner.decode_attention_backend_str))
        if full is None:
            raise AssertionError
        return full

    assert backend_entry.wrap(names, runner, "backend") == "backend"
    with pytest.raises(AssertionError):
        backend_entry.wrap(names, runner, None)
    assert seen == [("torch_native", "triton")] * 2
    assert (runner.prefill_attention_backend_str, runner.decode_attention_backend_str) == ("mminfer", "triton")


def test_pages_in_shared_storage_are_kept_by_head_config(models: dict[str, str]) -> None:
    skip_before("0.5.22")
    from sglang.srt.managers import cache_controller

    pool = SimpleNamespace(storage_format_tag=None)

    def name(model: str = "vision", head_config: str | None = None, guard: float | None = None, **fields: Any) -> str:
        server_args = arguments(models, model, device="cuda", **fields)
        setattr(server_args, flags.CONFIG_ATTRIBUTE, head_config)
        setattr(server_args, flags.GUARD_ATTRIBUTE, guard)
        server_args.resolve_once()
        return cache_controller.storage_model_name("served", pool)

    default, other = name(), name(head_config=config_file("test_a_shape"))
    assert default.startswith("served-mminfer-") and other.startswith("served-mminfer-") and default != other
    assert name() == default
    guarded = name(guard=0.1)
    assert guarded not in (default, other) and name(guard=0.1) == guarded, "pages of this process alone"
    assert (
        name(head_config="dense") == name(attention_backend="triton") == "served"
    )  # dense heads compute the same KV as stock SGLang


# Where the basis comes from


@pytest.mark.parametrize(
    "fields, awaited, warns",
    [
        ({}, True, False),
        ({"tp_size": 2, "pp_size": 2, "dp_size": 2}, True, False),
        ({"environ": {"SGLANG_MMINFER_CONFIG": "dense"}}, False, False),
        ({"environ": {"SGLANG_MMINFER_BASIS": "none"}}, False, False),
        ({"model": "text"}, False, False),
        ({"is_embedding": True}, False, True),
        ({"skip_tokenizer_init": True}, False, True),
        ({"disaggregation_mode": "prefill"}, False, True),
    ],
    ids=str,
)
def test_who_sends_itself_the_clip(
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    awaited: bool,
    warns: bool,
) -> None:
    """It is noted on the arguments, which every process of the server gets."""
    monkeypatch.setenv("SGLANG_MMINFER_CONFIG", CHOOSES_BY_A_BASIS)
    server_args = arguments(models, device="cuda", **with_environment(fields, monkeypatch))
    with caplog.at_level(logging.WARNING, logger="sglang_mminfer"):
        server_args.resolve_once()
    assert basis_choice.is_awaited(pickle.loads(pickle.dumps(server_args))) == awaited
    assert ("`mminfer basis` makes a file for SGLANG_MMINFER_BASIS" in caplog.text) == warns


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tokenizer_worker_num": 2}, "tokenizer workers"),
        ({"grpc_mode": True}, "--grpc-mode"),
        ({"smg_grpc_mode": True}, "--grpc-mode"),
        ({"language_only": True}, "media are encoded by another server"),
        ({"encoder_only": True}, "media are encoded by another server"),
        ({"disaggregation_mode": "prefill"}, "different servers"),
        ({"environ": {"SGLANG_RUST_SERVER": "1"}}, "the Rust server"),
    ],
    ids=str,
)
def test_no_clip_where_it_would_never_come(
    models: dict[str, str], fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of ours runs where the requests come in, or the clip's pictures would need another server."""
    model = model_config_of(arguments(models))
    assert basis_choice.why_no_clip(arguments(models), model) is None
    server_args = arguments(models, **with_environment(fields, monkeypatch))
    assert words in (basis_choice.why_no_clip(server_args, model) or "")


def test_a_file_gives_the_basis(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MMINFER_CONFIG", CHOOSES_BY_A_BASIS)
    server_args = arguments(models, device="cuda")
    hf_config = model_config_of(server_args).hf_config
    model = fingerprint_of(hf_config)
    how = Provenance("calibration", "of a test", calibration="noise", date="2026-11-26")
    forms = torch.randn(2, model.layers, model.kv_heads, 8, model.head_dim)
    basis = ModelBasis(model, how, *forms)
    basis.save(tmp_path / "some.basis.npz")
    monkeypatch.setenv("SGLANG_MMINFER_BASIS", str(tmp_path / "some.basis.npz"))
    head_config, _ = head_config_choice.load_for_model(server_args, hf_config)
    assert head_config.basis is not None and head_config.basis.digest == basis.digest
    server_args.resolve_once()
    assert not basis_choice.is_awaited(server_args)
    dataclasses.replace(basis, queries=forms[0, :, :, :4], keys=forms[1, :, :, :4]).save(tmp_path / "some.basis.npz")
    for setting, words in (
        (str(tmp_path / "some.basis.npz"), "expected a rank of at most 4"),
        (str(tmp_path / "nothing.npz"), "nothing.npz: no such file"),
        ("clips", "SGLANG_MMINFER_BASIS: expected clip, none, or a file that `mminfer basis` wrote"),
    ):
        monkeypatch.setenv("SGLANG_MMINFER_BASIS", setting)
        with pytest.raises(HeadConfigError, match=words):
            arguments(models, device="cuda").resolve_once()


# Refusals

REFUSED: dict[str, dict[str, Any]] = {
    "executor": {"environ": {"SGLANG_MMINFER_EXECUTOR": "cutlass"}},
    "sparse": {"environ": {"SGLANG_MMINFER_SPARSE": "never"}},
    "dense_heads": {"environ": {"SGLANG_MMINFER_DENSE_HEADS": "1"}},
    "audit": {"environ": {"SGLANG_MMINFER_AUDIT": "1.5"}},
    "guard": {"environ": {"SGLANG_MMINFER_GUARD": "5"}},
    "guard_without_audit": {"environ": {"SGLANG_MMINFER_GUARD": "0.1", "SGLANG_MMINFER_AUDIT": "0"}},
    "mends": {"environ": {"SGLANG_MMINFER_MENDS": "no_such_mend"}},
    "plan_budget": {"environ": {"SGLANG_MMINFER_PLAN_BUDGET_MS": "0"}},
    "max_megapixels": {"environ": {"SGLANG_MMINFER_MAX_MEGAPIXELS": "large"}},
    "media_root": {"environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/no such directory"}},
    "media_cache": {"environ": {"SGLANG_MMINFER_MEDIA_CACHE_MB": "inf"}},
    "media_root_passed_by": {"environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/"}, "language_only": True},
    "media_root_not_held": {
        "environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/"},
        "gone": ("sglang.srt.utils.video_decoder.VideoDecoderWrapper.__init__",),
    },
    "decode_only": {"attention_backend": None, "decode_attention_backend": "mminfer"},
    "ray": {"use_ray": True},
    "deterministic": {"enable_deterministic_inference": True},
    "multi_item_scoring": {"enable_mis": True},
    "no_kv_cache": {
        "prefill_only_disable_kv_cache": True,
        "is_embedding": True,
        "disable_radix_cache": True,
        "chunked_prefill_size": -1,
    },
    "unified_memory": {"enable_unified_memory": True},
    "kv_sharding": {"enable_kv_cache_sharding": True, "since": "0.5.22"},
    "kv_layout": {"environ": {"SGLANG_USE_HND_KVCACHE": "1"}},
    "block_scaled_kv": {"kv_cache_dtype": "fp4_mx_block16"},
    "prefill_context_parallel": {"attn_cp_size": 2, "tp_size": 2},
    "decode_context_parallel": {"dcp_size": 2, "tp_size": 2},
    "pdmux": {"enable_pdmux": True},
    "diffusion_llm": {"dllm_algorithm": "LowConfidence"},
    "hisparse": {"enable_hisparse": True},
    "full_prefill_graph": {"cuda_graph_backend_prefill": "full"},
    "mla": {"model": "mla"},
    "linear_attention": {"model": "linear_attention"},
    "encoder_decoder": {"model": "encoder_decoder"},
    "own_sparse_attention": {"model": "own_sparse_attention"},
    "listed_backends": {"model": "gemma4"},
    "pictures_off": {"model": "gemma3"},
    "draft_backend": {
        "speculative_algorithm": "EAGLE",
        "prefill_attention_backend": "mminfer",
        "attention_backend": "flex_attention",
        "device": "cuda",
    },
    "pages_on_cpu": {"page_size": 16, "device": "cpu", "unable": ("allocates_pages_anywhere",)},
    "speculation_on_cpu": {"speculative_algorithm": "NGRAM", "device": "cpu"},
    "tokenizer_workers": {"tokenizer_worker_num": 2, "device": "cpu"},
    "hicache_storage": {"enable_hierarchical_cache": True, "hicache_storage_backend": "hf3fs"},
    "hicache_names": {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "file",
        "environ": {"SGLANG_MMINFER_CONFIG": "grid_static"},
        "gone": ("sglang.srt.managers.cache_controller.storage_model_name",),
    },
    "hicache_basis": {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "file",
        "environ": {"SGLANG_MMINFER_CONFIG": CHOOSES_BY_A_BASIS},
        "since": "0.5.22",
    },
}
ALSO_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("deterministic", {"rl_on_policy_target": "fsdp"}),
    ("media_root_passed_by", {"environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/"}, "grpc_mode": True}),
    (
        "media_root_passed_by",
        {"environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/"}, "tokenizer_worker_num": 2, "device": "cuda", "model": "text"},
    ),
    ("media_root_passed_by", {"environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/", "SGLANG_RUST_SERVER": "1"}}),
    ("own_sparse_attention", {"model": "delta_nets_and_indexer"}),
    ("listed_backends", {"model": "llama4"}),
    ("listed_backends", {"model": "llama4", "device": "cpu"}),  # where SGLang itself lets any backend in
    ("listed_backends", {"model": "exaone4"}),
    ("unified_memory", {"enable_page_major_kv_layout": True}),
    ("block_scaled_kv", {"kv_cache_dtype": "mxfp8"}),
    ("prefill_context_parallel", {"enable_prefill_cp": True}),
    ("decode_only", {"prefill_attention_backend": "triton"}),
    ("tokenizer_workers", {"tokenizer_worker_num": 2, "device": "cuda"}),  # the model's media are mended
    ("hicache_storage", {"enable_hierarchical_cache": True, "hicache_storage_backend": "dynamic"}),
    *(
        ("speculation_on_cpu", {"device": "cpu", **fields})
        for fields in (
            {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 4},
            {"speculative_algorithm": "EAGLE3", "enable_multi_layer_eagle": True},
            {"speculative_algorithm": "EAGLE3", "model": "delta_nets"},
            {"speculative_algorithm": "STANDALONE"},
            {
                "speculative_algorithm": "EAGLE3",
                "gone": ("sglang.kernels.ops.speculative.spec_tree.verify_tree_greedy_func",),
            },
        )
    ),
]
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"environ": {"SGLANG_MMINFER_EXECUTOR": "flashinfer", "SGLANG_MMINFER_DENSE_HEADS": "stock"}},
    {"environ": {"SGLANG_MMINFER_EXECUTOR": "", "SGLANG_MMINFER_DENSE_HEADS": ""}},
    {"environ": {"SGLANG_MMINFER_GUARD": "0.1"}},
    {"environ": {"SGLANG_MMINFER_MEDIA_ROOT": "/"}},
    {"environ": {"SGLANG_MMINFER_GUARD": "0", "SGLANG_MMINFER_AUDIT": "0"}},
    {"attention_backend": None, "prefill_attention_backend": "mminfer"},
    {"attention_backend": "triton", "prefill_attention_backend": "mminfer"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"kv_cache_dtype": "fp8_e5m2"},
    {"cuda_graph_backend_prefill": "breakable"},
    *({"speculative_algorithm": name, "device": "cpu", "since": "0.5.23"} for name in ("EAGLE3", "eagle3")),
    {"speculative_algorithm": "NGRAM", "device": "cuda"},
    {"speculative_algorithm": "EAGLE", "speculative_draft_attention_backend": "triton", "device": "cuda"},
    {"tp_size": 2, "pp_size": 2, "dp_size": 2},
    {"disable_radix_cache": True, "chunked_prefill_size": -1},
    {"tokenizer_worker_num": 2, "device": "cuda", "model": "text"},
    {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "file",
        "environ": {"SGLANG_MMINFER_CONFIG": "grid_static"},
        "since": "0.5.22",
    },
    {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "file",
        "environ": {"SGLANG_MMINFER_CONFIG": CHOOSES_BY_A_BASIS, "SGLANG_MMINFER_BASIS": "none"},
        "since": "0.5.22",
    },
    {"is_embedding": True},
    {"model": "text"},
    {"model": "delta_nets"},
    {"model": "gemma3", "enable_multimodal": True},
    {"model": "gemma3", "enable_multimodal": False},  # asked for
]


def with_environment(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The fields without "environ", whose variables are set, "gone", whose targets of hooks SGLang no longer has,
    "unable", what an older release of SGLang cannot do, and "since", the release of SGLang that the test needs."""
    skip_before(fields.get("since", "0"))
    for name, value in fields.get("environ", {}).items():
        monkeypatch.setenv(name, value)
    if gone := fields.get("gone"):
        exists = Hook.target_exists
        monkeypatch.setattr(Hook, "target_exists", lambda hook: hook.target not in gone and exists(hook))
    for name in fields.get("unable", ()):
        monkeypatch.setattr(releases, name, lambda: False)
    return {name: value for name, value in fields.items() if name not in ("environ", "gone", "unable", "since")}


def test_every_refusal_is_tried() -> None:
    assert [refusal.name for refusal in launch.REFUSALS] == list(REFUSED)


@pytest.mark.parametrize("name, fields", [*REFUSED.items(), *ALSO_REFUSED])
def test_refused_with_its_own_words_only(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, fields: dict[str, Any]
) -> None:
    fields = with_environment(fields, monkeypatch)
    message = next(refusal.message for refusal in launch.REFUSALS if refusal.name == name)
    with pytest.raises(hooks.UnsupportedLaunch) as refused:
        launch.refuse(arguments(models, **fields))
    assert str(refused.value) == f"mminfer: {message}"
    assert message.endswith(".")


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_accepted(models: dict[str, str], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    launch.refuse(arguments(models, **with_environment(fields, monkeypatch)))


def test_two_reasons_are_both_given(models: dict[str, str]) -> None:
    with pytest.raises(hooks.UnsupportedLaunch) as refused:
        launch.refuse(arguments(models, use_ray=True, enable_pdmux=True))
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_real_resolution(models: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """SGLang's own pipeline refuses it before its checks by backend name, and before any process starts."""
    fields = with_environment(REFUSED[name], monkeypatch)
    with pytest.raises(hooks.UnsupportedLaunch) as refused:
        arguments(models, **fields).resolve_once()
    assert next(refusal.message for refusal in launch.REFUSALS if refusal.name == name) in str(refused.value)


def test_launch_without_mminfer_is_not_touched(models: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    server_args = arguments(models, attention_backend="torch_native", device="cpu")
    setattr(server_args, flags.CONFIG_ATTRIBUTE, "dense")
    with caplog.at_level(logging.WARNING, logger="sglang_mminfer"):
        server_args.resolve_once()
    assert resolving_view(server_args).attention_backend == "torch_native"
    assert "--mminfer-config has no effect" in caplog.text
    assert not mends.wanted(server_args)


def test_audit_flag_arrives_and_a_bad_one_is_a_usage_error(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert flags.audit_rate(parse(models, "--mminfer-audit", "0.05"), {settings.AUDIT.variable: "1"}) == 0.05
    assert flags.audit_rate(parse(models), {settings.AUDIT.variable: "0.5"}) == 0.5
    assert flags.audit_rate(parse(models), {}) == 0.0
    with pytest.raises(SystemExit):
        parse(models, "--mminfer-audit", "2")
    assert "argument --mminfer-audit: expected a share of requests from 0 to 1, got '2'" in capsys.readouterr().err


def test_guard_flag_arrives_and_a_bad_one_is_a_usage_error(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = parse(models, "--mminfer-guard", "0.05")
    assert flags.guard_error(guarded, {settings.GUARD.variable: "1"}) == 0.05
    assert flags.guard_error(parse(models), {settings.GUARD.variable: "0.5"}) == 0.5
    assert flags.guard_error(parse(models), {}) == 0.0
    assert flags.audit_rate(guarded, {}) == settings.GUARD_AUDIT_RATE
    assert flags.audit_rate(guarded, {settings.AUDIT.variable: "0.5"}) == 0.5
    with pytest.raises(hooks.UnsupportedLaunch, match="--mminfer-audit 0 audits none"):
        launch.refuse(parse(models, "--mminfer-guard", "0.05", "--mminfer-audit", "0"))
    with pytest.raises(SystemExit):
        parse(models, "--mminfer-guard", "2")
    assert "argument --mminfer-guard: expected a relative output error from 0" in capsys.readouterr().err


def test_media_root_arrives_and_is_refused_without_mminfer(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = parse(models, "--mminfer-media-root", str(tmp_path))
    assert flags.media_root(pickle.loads(pickle.dumps(limited))) == str(tmp_path)
    with pytest.raises(SystemExit):
        parse(models, "--mminfer-media-root", str(tmp_path / "nowhere"))
    assert "argument --mminfer-media-root: expected a directory that exists" in capsys.readouterr().err
    stock = parse(models, "--mminfer-media-root", str(tmp_path), "--attention-backend", "triton", "--device", "cpu")
    with pytest.raises(hooks.UnsupportedLaunch, match="nothing would hold --mminfer-media-root"):
        stock.resolve_once()


def test_the_variable_of_the_media_root_warns_without_mminfer(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(settings.MEDIA_ROOT.variable, "/")
    with caplog.at_level(logging.WARNING, logger="sglang_mminfer"):
        arguments(models, attention_backend="torch_native", device="cpu").resolve_once()
    assert "SGLANG_MMINFER_MEDIA_ROOT has no effect without --attention-backend mminfer" in caplog.text


def test_text_model_is_served_with_a_warning(models: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sglang_mminfer"):
        arguments(models, "text", device="cpu").resolve_once()
    assert "every request will run dense" in caplog.text


# Media


def _videos(grids: list[list[int]], first: int = 10) -> Any:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    patches = [t * h * w for t, h, w in grids]
    offsets, start = [], first
    for count in patches:
        offsets.append((start, start + count // 4 - 1))
        start += count // 4 + 5
    item = MultimodalDataItem(modality=Modality.VIDEO)
    item.feature = torch.arange(sum(patches) * 3, dtype=torch.float32).view(-1, 3)
    item.offsets = offsets
    item.model_specific_data = {
        "video_grid_thw": torch.tensor(grids),
        "second_per_grid_ts": [0.5 + i for i in range(len(grids))],
    }
    return item


def _split(item: Any) -> list[Any]:
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items

    return [video for part in get_new_expanded_mm_items([item]) for video in videos_of(part)]


def test_every_video_becomes_an_item() -> None:
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items

    def hashes(grids: list[list[int]]) -> list[int]:
        items = _split(_videos(grids))
        for item in items:
            item.set_pad_value()
        return [item.hash for item in items]

    grids = [[3, 4, 4], [2, 4, 8], [5, 2, 2]]
    whole = _videos(grids)
    assert len(get_new_expanded_mm_items([whole])) == 1  # stock SGLang
    items = _split(whole)
    assert [item.offsets for item in items] == [[offset] for offset in whole.offsets]
    assert torch.equal(torch.cat([item.feature for item in items]), whole.feature)
    assert [item.video_grid_thw.tolist() for item in items] == [[grid] for grid in grids]
    assert [item.second_per_grid_ts for item in items] == [[0.5], [1.5], [2.5]]
    # Later videos do not change a video's hash, so the radix keys of its tokens stay the same.
    assert hashes(grids)[:2] == hashes(grids[:2])
    assert hashes(grids[:1]) == hashes(grids)[:1]


@pytest.mark.parametrize("what", ["span per frame", "no grid", "features elsewhere", "image"])
def test_other_items_are_left_to_sglang(what: str) -> None:
    from sglang.srt.managers.schedule_batch import Modality

    item = _videos([[3, 4, 4], [2, 4, 8]])
    if what == "span per frame":  # Qwen3-VL
        item.offsets = [(i * 20, i * 20 + 3) for i in range(5)]
    elif what == "no grid":
        del item.model_specific_data["video_grid_thw"]
    elif what == "features elsewhere":
        item.feature = None
    else:
        item.modality = Modality.IMAGE
    assert videos_of(item) == [item]


def test_decord_decodes_where_ffmpeg_is_missing(tmp_path: Path) -> None:
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    path = tmp_path / "clip.mp4"
    make_video(path, 12, 64, 32)
    video = VideoDecoderWrapper(path.read_bytes())
    assert len(video) == 12
    frames = video.get_frames_as_tensor([0, 5, 11])  # pins them if there is an accelerator
    assert frames.shape == (3, 32, 64, 3)
    with pytest.raises(Exception):  # noqa: B017 - each decoder raises its own error
        VideoDecoderWrapper(os.urandom(64))

"""Servers that ask neither for mminfer nor for the CPU do not notice that the package is installed.

SGLang resolves each launch in a process with the plugin and in a process where SGLANG_PLUGINS leaves it out. The device
is "cuda", which this machine may lack: SGLang resolves arguments for it anyway, and "cpu" would bring our platform.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from families import FAMILY
from launches import launch
from sglang_mminfer.serving import cpu_platform

MODELS = ("llava_video", "llava_v1_5", "qwen2_5_vl")
BACKENDS = (None, "flashinfer")
WITHOUT = {"SGLANG_PLUGINS": "none"}

on_cpu = pytest.mark.skipif(bool(cpu_platform.accelerators()), reason="this machine has an accelerator")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(FAMILY[name].make(root / name)) for name in MODELS}


def test_other_backends_are_served_as_without_the_package(models: dict[str, str]) -> None:
    steps: list[dict[str, Any]] = [
        {"model_path": path, "device": "cuda", "attention_backend": backend}
        for path in models.values()
        for backend in BACKENDS
    ]
    with_it, without = launch(*steps), launch(*steps, environ=WITHOUT)
    for step, ours, stock in zip(steps, with_it, without):
        assert ours.pop("hooks") and not stock.pop("hooks")  # the first process had the plugin, the second had not
        assert ours == stock, step
    classes = {found["model"].rpartition(".")[2] for found in with_it}
    assert "LlavaQwenForCausalLM" in classes and not any("mminfer" in found["model"] for found in with_it)


@on_cpu
def test_a_machine_that_lost_its_gpus_fails_as_without_the_package(models: dict[str, str]) -> None:
    step = {"model_path": models["qwen2_5_vl"]}
    (ours,), (stock,) = launch(step), launch(step, environ=WITHOUT)
    assert ours == stock
    assert "No accelerator" in ours["error"]


@on_cpu
def test_engines_of_one_process_go_by_their_own_arguments(models: dict[str, str]) -> None:
    """This includes an engine that does not ask for the CPU after one that does."""
    llava = {"model_path": models["llava_video"], "device": "cpu"}
    ask, stock, lost = (
        {**llava, "attention_backend": "mminfer"},
        {**llava, "attention_backend": "torch_native"},
        {"model_path": models["llava_video"], "attention_backend": "torch_native"},
    )
    first, second, third, again = launch(ask, stock, lost, ask)
    assert first == again
    assert first["model"].startswith("sglang_mminfer.families.llava_video.")
    assert first["processor"].startswith("sglang_mminfer.families.llava_video.")
    assert (second["model"], second["config"]) == ("sglang.srt.models.llava.LlavaQwenForCausalLM", "LlavaConfig")
    assert second["processor"].startswith("sglang.srt.multimodal.processors.")
    assert first["platform"] == second["platform"] == cpu_platform.PLATFORM_NAME
    assert (third["platform"], "No accelerator" in third["error"]) == (None, True)


def test_nothing_is_asked_of_the_hub_for_others(monkeypatch: pytest.MonkeyPatch, note: Callable[[Any], None]) -> None:
    from transformers import utils

    from sglang_mminfer.families.own import registration

    def refuse(path: str, name: str, **options: Any) -> None:
        raise AssertionError(f"{name} was looked for")

    monkeypatch.setattr(utils, "cached_file", refuse)
    for backend in ("triton", None):
        note(SimpleNamespace(attention_backend=backend))
        assert registration.parse_config(lambda *args, **kwargs: "stock", None, "some/model", False) == "stock"
        assert registration.load_processor(lambda *args, **kwargs: "stock", "some/model") == "stock"
    note(SimpleNamespace(prefill_attention_backend="mminfer"))
    with pytest.raises(AssertionError, match=r"config.json was looked for"):
        registration.parse_config(lambda *args, **kwargs: "stock", None, "some/model", False)

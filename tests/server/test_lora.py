"""LoRA: a server with an adapter answers with it as a server of the merged weights does, and without it as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import no_device
from serving import DENSE_BELOW, References, Served, ran_sparse, same, serve
from sglang_mminfer.testing.oracle import OracleAnswer

pytestmark = [pytest.mark.server("one_shot"), pytest.mark.wide]

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
NAME = "adapter"


def make_adapter(folder: Path, weights: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Writes an adapter in PEFT's format. Returns the weights with it merged."""
    draw = torch.Generator().manual_seed(seed)
    merged, parts = dict(weights), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.startswith("model.") and module.rpartition(".")[2] in ADAPTED:
            a = torch.randn(RANK, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5
            b = torch.randn(weight.shape[0], RANK, generator=draw) * weight.std() / 2
            parts |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            merged[name] = weight + ALPHA / RANK * b @ a
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(ADAPTED), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


@pytest.fixture(scope="module")
def adapted(
    model: Path, references: References, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, list[OracleAnswer]]]:
    """A server with the adapter, and the answers of a server of the merged weights to the turns."""
    folder = tmp_path_factory.mktemp("lora")
    merged = shutil.copytree(model, folder / "merged")
    (file,) = merged.glob("*.safetensors")
    save_file(make_adapter(folder / NAME, load_file(file)), file, metadata={"format": "pt"})
    flags = ("--attention-backend", "mminfer", "--mminfer-config", str(sparse_config))
    plain = serve(folder, merged, (*flags, "--chunked-prefill-size", "-1", "--disable-radix-cache"), {})
    with plain.server:
        expected = [plain.ask(prompt) for prompt, _ in references.turns]
    lora = ("--enable-lora", "--lora-paths", f"{NAME}={folder / NAME}", "--lora-backend", "torch_native")
    env = {"PYTHONPATH": no_device.install(folder / "plugin")}
    served = serve(folder, model, (*flags, *lora, "--chunked-prefill-size", "96"), env)
    with served.server:
        yield served, expected


def test_a_conversation_with_and_without_the_adapter(
    adapted: tuple[Served, list[OracleAnswer]], references: References
) -> None:
    """Turn by turn, each with the adapter and without it: neither takes the other's keys and values from the cache."""
    served, expected = adapted
    known = 0
    for turn, ((prompt, plain), with_adapter) in enumerate(zip(references.turns, expected)):
        got = served.ask(prompt, rid=f"adapter-{turn}", lora_path=NAME)
        same(with_adapter, got)
        without = served.ask(prompt, rid=f"plain-{turn}")
        same(plain, without)
        assert got.token_ids != without.token_ids
        assert min(got.cached_tokens or 0, without.cached_tokens or 0) >= known
        known = len(plain.prompt_ids)
        for rid in (f"adapter-{turn}", f"plain-{turn}"):
            assert ran_sparse([r for r in served.records(rid) if r.seq_len > DENSE_BELOW])


def test_both_in_one_batch(adapted: tuple[Served, list[OracleAnswer]], references: References) -> None:
    """The same prompts at the same time, with the adapter and without it."""
    served, expected = adapted
    prompts = [prompt for prompt, _ in references.turns[-2:]]
    asked = [(prompt, lora) for prompt in prompts for lora in (NAME, None)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: served.ask(each[0], lora_path=each[1]), asked))
    for i, (_, plain) in enumerate(references.turns[-2:]):
        same(expected[len(expected) - 2 + i], answers[2 * i])
        same(plain, answers[2 * i + 1])

"""LongVILA by its name on the hub: config, tokenizer's folder and weights' folders from the cache of huggingface_hub.

A process of its own, because huggingface_hub reads where its cache is when it is imported. No network is asked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins

from families import longvila
from sglang_mminfer.tools.doctor import report as doctor

NAME = "Efficient-Large-Model/qwen2-7b-longvila-1M"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

load_plugins()

RESOLVE = """
import json, sys
from sglang_mminfer.tools.doctor.report import server_args_of

from sglang.srt.plugins import load_plugins
load_plugins()
server_args = server_args_of(sys.argv[1], None)

from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.model_loader.weight_utils import download_weights_from_hf
from sglang.srt.utils.hf_transformers_utils import get_processor, get_tokenizer

view, model = resolving_view(server_args), model_config_of(server_args)
processor = get_processor(view.tokenizer_path, model_name=view.model_path, revision=view.revision)
folders = [f"{name}/*.safetensors" for name in ("llm", "vision_tower", "mm_projector")]
print(json.dumps({
    "model_path": view.model_path,
    "tokenizer_path": view.tokenizer_path,
    "architectures": model.hf_config.architectures,
    "layers": model.num_hidden_layers,
    "tokens": len(get_tokenizer(view.tokenizer_path)),
    "processor_tokens": len(processor.tokenizer),
    "template": processor.chat_template,
    "weights": [download_weights_from_hf(view.model_path, None, [folder], view.revision) for folder in folders],
}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the repository, laid out as huggingface_hub does: blobs, a snapshot of links, a ref."""
    root = tmp_path_factory.mktemp("hub")
    made = longvila.make(root / "made")
    repository = root / "home" / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in made.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return root / "home"


def resolved(home: Path) -> dict[str, Any]:
    """What SGLang makes of the name, in a process that has this cache and no network."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, NAME],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_name_on_the_hub(home: Path) -> None:
    snapshot = home / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    found = resolved(home)
    assert (found["model_path"], found["tokenizer_path"]) == (NAME, str(snapshot / "llm"))
    assert found["architectures"] == ["LongVilaForConditionalGeneration"]
    language = json.loads((snapshot / "llm" / "config.json").read_text())
    assert found["layers"] == language["num_hidden_layers"]
    assert found["tokens"] == found["processor_tokens"] > language["vocab_size"], "media tokens are beyond the rows"
    assert "<|im_start|>" in found["template"]
    assert found["weights"] == [str(snapshot)] * 3


def test_a_folder_without_the_tokenizer(home: Path, tmp_path: Path) -> None:
    """As a cache that somebody has only looked at the configs of."""
    snapshot = next(home.glob("hub/*/snapshots/*"))
    shutil.copytree(snapshot, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ValueError, match=r"model: expected its tokenizer in the folder llm, got no tokenizer_config"):
        doctor.server_args_of(str(tmp_path / "model"), None)

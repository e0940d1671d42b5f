"""What is read from a config is the text model's that is served, wherever a family keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.utils.hf_transformers.config import get_config

from families import FAMILY
from sglang_mminfer.families.item_checks import embedding_width
from sglang_mminfer.mends.token_ids import vocabulary_of

INSIDE = {"internvl": "llm_config", "llava_v1_5": None, "llava_onevision_lmms": None, "llava_onevision": "text_config"}
"""Family -> the part of its config.json that tells of the text model; None: all of it."""


@pytest.mark.parametrize("name", INSIDE)
def test_widths_and_vocabularies_are_those_of_the_served_model(name: str, tmp_path: Path) -> None:
    """An original LLaVA has a text_config, too, of transformers' defaults: 4,096 numbers and 32,000 words."""
    path = FAMILY[name].make(tmp_path / "model")
    stored = json.loads((path / "config.json").read_text())
    text = stored if INSIDE[name] is None else stored[INSIDE[name]]
    config = get_config(str(path), trust_remote_code=True)
    assert embedding_width(config) == text["hidden_size"]
    assert vocabulary_of(SimpleNamespace(hf_config=config, _tokenizer=[])) == text["vocab_size"]

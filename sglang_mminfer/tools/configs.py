"""`mminfer config`: head configs read as a server would read them, without a server."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from sglang_mminfer.tools.errors import Failed

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig


def check(name: str, model_path: str | None, as_json: bool) -> int:
    """Read a head config, fit it to a model if one is given, and print a line. Returns exit status 0.

    Raises:
        Failed: a server would not take it; the message names the place in the file and what was expected.
    """
    config = _load(name, model_path)
    if as_json:
        print(json.dumps({"ok": True, "name": config.name, "config": config.describe()}, indent=1))
    else:
        print(f"{config.describe()}\nA server takes it{f' with {model_path}' if model_path else ''}.")
    return 0


def show(name: str, as_json: bool) -> int:
    """Print a head config: in words with how many heads have each pattern, or the JSON of its file. Returns 0.

    Raises:
        Failed: as `check`.
    """
    from sglang_mminfer.head_config import words_of

    config = _load(name, None)
    if as_json:
        print(config.to_json())
        return 0
    print(config.describe())
    print(f"file: {config.path}")
    for key, value in _provenance(config).items():
        print(f"{key}: {value}")
    if config.model is not None:
        print(f"made for: {config.model}")
    heads: dict[str, int] = {}
    for row in config.rows:
        for head in row:
            heads[words_of(head)] = heads.get(words_of(head), 0) + 1
    for words, count in sorted(heads.items(), key=lambda entry: -entry[1]):
        print(f"{'all' if config.form == 'all' else count:>6}  {words}")
    return 0


def list_built_in(as_json: bool) -> int:
    """Print the built-in head configs with a line each. Returns 0."""
    files = sorted(resources.files("sglang_mminfer.head_configs").iterdir(), key=lambda entry: entry.name)
    notes = {
        file.name.removesuffix(".json"): json.loads(file.read_text())["provenance"]["note"]
        for file in files
        if file.name.endswith(".json")
    }
    if as_json:
        print(json.dumps([{"name": name, "note": note} for name, note in notes.items()], indent=1, ensure_ascii=False))
        return 0
    width = max(map(len, notes))
    for name, note in notes.items():
        print(f"{name:<{width}}  {note.split('. ')[0].rstrip('.')}.")
    return 0


def _load(name: str, model_path: str | None) -> HeadConfig:
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    try:
        config = HeadConfig.load(name)
        if model_path is None:
            return config
        from transformers import AutoConfig

        return config.bind(AutoConfig.from_pretrained(model_path))
    except (HeadConfigError, OSError, ValueError) as error:
        raise Failed(str(error)) from None


def _provenance(config: HeadConfig) -> dict[str, Any]:
    how = config.provenance
    entries = {"made by": how.how, "calibration": how.calibration, "budget": how.budget, "date": how.date}
    return {key: value for key, value in {**entries, "note": how.note}.items() if value}

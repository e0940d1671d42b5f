"""Bases that earlier starts made, in the user's cache folder: XDG_CACHE_HOME, or ~/.cache, sglang_mminfer/basis.

A file belongs to one model, the weights in its folder, one version of the built-in clip, one rank, and one rule by
which heads choose, as its shares do. Every rank of a server has the forms of its own heads and layers, so each writes a
part, in which the others' forms are 0, and whoever sees all parts adds them up. A file is written beside its place and
then put there, so that servers that start at once do not harm each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_mminfer.head_config import HeadConfigError, ModelBasis, fingerprint_of
from sglang_mminfer.head_config.basis_file import ENDING
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.serving import clip

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
NO_FILES = ("dummy", "remote", "remote_instance")
"""SGLang's ways to load a model whose weights are in no file here."""
FORMAT = 2
"""The version of what a key covers."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The place of one basis.

    Attributes:
        path: where the whole basis stands, if it is there.
    """

    path: Path

    def load(self) -> ModelBasis | None:
        """The basis; None if there is none. A file that cannot be read is removed, with a line in the log."""
        if not self.path.is_file():
            return None
        try:
            return ModelBasis.load(self.path)
        except HeadConfigError as error:
            logger.warning("mminfer: the basis of an earlier start is made anew, because it cannot be read: %s", error)
            _remove(self.path)
            return None

    def save(self, basis: ModelBasis, part: Part) -> Path | None:
        """Keeps what one rank has; puts the whole there if this was the last part. Returns its path if it is there.

        Args:
            basis: of the shape of the whole model, with 0 where other ranks have their forms.

        Raises:
            OSError: if the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_whole:
            _write(basis, self.path)
            return self.path
        _write(basis, self.path.with_name(part.file_name(self.path)))
        paths = part.others(self.path)
        if not part.covered(paths):
            return None
        try:
            parts = [ModelBasis.load(path) for path in paths]
        except HeadConfigError:  # another rank has just put the whole there and removed the parts
            return self.path if self.path.is_file() else None
        queries, keys = (torch.stack(of_parts).sum(0) for of_parts in zip(*((p.queries, p.keys) for p in parts)))
        of_parts = [p.shares for p in parts if p.shares is not None]
        shares = torch.stack(of_parts).sum(0) if len(of_parts) == len(parts) else None
        rule = None if shares is None else basis.rule
        _write(dataclasses.replace(basis, queries=queries, keys=keys, shares=shares, rule=rule), self.path)
        for path in paths:
            _remove(path)
        return self.path


@dataclasses.dataclass(frozen=True)
class Part:
    """The layers and query heads of one rank of a server, [start, stop) each, among those of the model.

    Attributes:
        layout: how the server spreads the model over its ranks, as a part of file names.
    """

    layers: tuple[int, int]
    heads: tuple[int, int]
    of_layers: int
    of_heads: int
    layout: str

    @property
    def is_whole(self) -> bool:
        """Whether the rank has all of the model."""
        return (self.layers, self.heads) == ((0, self.of_layers), (0, self.of_heads))

    def file_name(self, whole: Path) -> str:
        """The name of this part beside the whole."""
        (a, b), (c, d) = self.layers, self.heads
        return f"{self._stem(whole)}{a}-{b}.{c}-{d}{ENDING}"

    def others(self, whole: Path) -> list[Path]:
        """The parts of this layout that are there, this one included."""
        return sorted(whole.parent.glob(f"{self._stem(whole)}*{ENDING}"))

    def covered(self, paths: list[Path]) -> bool:
        """Whether parts hold every layer and head exactly once."""
        times = np.zeros((self.of_layers, self.of_heads), dtype=int)
        for path in paths:
            if numbers := re.search(r"\.(\d+)-(\d+)\.(\d+)-(\d+)$", path.name.removesuffix(ENDING)):
                a, b, c, d = map(int, numbers.groups())
                times[a:b, c:d] += 1
        return bool((times == 1).all())

    def _stem(self, whole: Path) -> str:
        return f"{whole.name.removesuffix(ENDING)}.{self.layout}."


def folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where bases are kept."""
    root = (os.environ if environ is None else environ).get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sglang_mminfer" / "basis"


def entry_of(server_args: Any, hf_config: Any, rank: int, rule: Adaptive | None = None) -> Entry | None:
    """The place of a model's basis of some rank. None if nobody can tell which weights the server has: they are random,
    come over a network, or lie neither in a folder nor in the hub's cache.

    Args:
        server_args: SGLang's ServerArgs, or an object with some of its fields.
        hf_config: the model's transformers config, with overrides applied.
        rule: how heads choose whose shares the basis has; None: it has none.
    """
    name, revision = getattr(server_args, "model_path", None), getattr(server_args, "revision", None)
    if not name or str(getattr(server_args, "load_format", "auto")) in NO_FILES:
        return None
    files = weight_files(str(name), revision)
    if not files:
        return None
    # Nothing that SGLang resolves only after the launch: the launch looks for the file that a scheduler wrote.
    content = {
        "format": FORMAT,
        "clip": clip.VERSION,
        "rank": rank,
        "rule": None if rule is None else dataclasses.asdict(rule),
        "model": msgspec.to_builtins(fingerprint_of(hf_config)),
        "overrides": str(getattr(server_args, "json_model_override_args", "")),
        "revision": str(revision),
        "files": [(str(path), info.st_size, info.st_mtime_ns) for path, info in files],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    return Entry(folder() / f"{digest}{ENDING}")


def weight_files(model_path: str, revision: str | None) -> list[tuple[Path, os.stat_result]]:
    """The files of a model's weights, and its config; none if they are not on this machine (yet)."""
    path = Path(model_path)
    if not path.exists():
        path = _snapshot(model_path, revision) or path
    paths = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    weights = [p for p in paths if p.suffix in WEIGHTS and p.is_file()]
    configs = [p for p in paths if p.name == "config.json"] if weights else []
    return [(p.absolute(), p.stat()) for p in (*configs, *weights)]


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a model of the hub in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _write(basis: ModelBasis, path: Path) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        basis.save(fresh)
        os.replace(fresh, path)
    finally:
        _remove(fresh)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("mminfer: %s cannot be removed: %s", path, error)

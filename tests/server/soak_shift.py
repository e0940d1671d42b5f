"""The servers of the soak: every family in turn, with other settings each time."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config_files import config_file
from families import FAMILIES, Family
from serving import RETRACTS, Served, serve

WORDS = 640
"""Tokens that a small pool holds beside the media."""


@dataclass(frozen=True)
class Settings:
    """What is drawn for one server.

    Attributes:
        covering: its config leaves nothing out, so that it does not matter whether a token was generated or prefilled.
        chunk: tokens of a chunk; -1: prompts are not cut.
        small_pool: the KV pool holds little more than one conversation, and admits requests too eagerly.
    """

    covering: bool
    dense_below: int
    chunk: int
    page: int
    small_pool: bool
    mixed_chunks: bool
    retraction: bool
    radix_cache: bool
    overlap: bool
    ranks: int


@dataclass(frozen=True)
class Shift:
    """One server and the conversations that it has."""

    number: int
    family: Family
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.number}-{self.family.name}"

    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"family": self.family.name, **asdict(self.settings)}

    def server(self, folder: Path) -> Served:
        """The server, not started."""
        folder.mkdir(parents=True, exist_ok=True)
        family, drawn = self.family, self.settings
        options = {"video": dict(family.video_options)}
        flags = [
            *("--attention-backend", "mminfer", "--sleep-on-idle", "--mminfer-config", str(self._config(folder))),
            *("--chunked-prefill-size", str(drawn.chunk), "--tp-size", str(drawn.ranks)),
            *(["--page-size", str(drawn.page)] if drawn.page > 1 else []),
            *(["--mm-process-config", json.dumps(options)] if family.video_options else []),
            *(["--enable-mixed-chunk"] if drawn.mixed_chunks else []),
            *([] if drawn.radix_cache else ["--disable-radix-cache"]),
            *([] if drawn.overlap else ["--disable-overlap-schedule"]),
            *family.flags,
        ]
        if drawn.small_pool:
            tokens = -(-(family.reach + WORDS) // drawn.page) * drawn.page
            flags += ["--max-total-tokens", str(tokens), "--schedule-conservativeness", "0.05"]
        return serve(folder, family.make(folder / "model"), flags, RETRACTS if drawn.retraction else {})

    def _config(self, folder: Path) -> Path:
        name = "test_covering_mixed" if self.settings.covering else "test_mixed_heads"
        written = Path(config_file(name)).read_text()
        if "row grid" not in self.family.patterns:
            written = written.replace('"row"', '"frame"')
        config = json.loads(written)
        config["defaults"]["dense_below"] = self.settings.dense_below
        path = folder / "heads.json"
        path.write_text(json.dumps(config))
        return path


def shift(seed: int, number: int) -> Shift:
    """Shift `number` of a soak. Each round over the families has an order of its own."""
    turn, place = divmod(number, len(FAMILIES))
    family = random.Random(f"{seed}-round-{turn}").sample(FAMILIES, len(FAMILIES))[place]
    draw = random.Random(f"{seed}-shift-{number}")
    page = 1 if family.recurrent else draw.choice([1, 1, 4, 16, 64])  # a recurrent state has a page for each token
    settings = Settings(
        covering=draw.random() < 0.5,
        dense_below=draw.choice([0, 0, 200]),
        chunk=draw.choice([64, 64, 128, 128, 256, 1024, -1, *([117] if page == 1 else [])]),
        page=page,
        small_pool=draw.random() < 0.5,
        mixed_chunks=draw.random() < 0.6,
        retraction=draw.random() < 0.5,
        radix_cache=draw.random() < 0.85,
        overlap=draw.random() < 0.7,
        ranks=2 if family.tensor_parallel and draw.random() < 0.1 else 1,
    )
    return Shift(number, family, settings)

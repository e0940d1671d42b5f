"""The record of a long run: where it ran, what was counted, which faults came. The next run with the file goes on."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_mminfer.tools import machine

ROOT = Path(__file__).resolve().parents[2]


def command(target: str, prefix: str) -> str:
    """What was typed: a target of make, and the variables that begin like this."""
    given = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(prefix) and not name.endswith("_RECORD")
    ]
    return " ".join([*given, target])


class RunRecord:
    """A record in a file.

    Args:
        path: the file; it is made if there is none.
        seed: of the run. A record of another seed is none to go on with.
        command: repeats the run.

    Attributes:
        parts: by the name of a part its counts, in the order in which parts were begun. `"done": True` in a part
            says that nothing of it is left.
        faults: each with what it is and with what reproduces it; `since` says what became of it.

    Raises:
        ValueError: the file's seed is another one.
    """

    def __init__(self, path: Path, seed: int, command: str) -> None:
        self.path = path
        self._began = time.monotonic()
        known = json.loads(path.read_text()) if path.exists() else {"seed": seed, "runs": [], "parts": {}, "faults": []}
        if known["seed"] != seed:
            raise ValueError(f"{path}: has the seed {known['seed']}, not {seed}; take another file")
        self._known = known
        self.parts: dict[str, dict[str, Any]] = known["parts"]
        self.faults: list[dict[str, Any]] = known["faults"]
        known["runs"].append({**machine.describe(), "command": command, "began": time.strftime("%Y-%m-%d %H:%M:%S")})

    def part(self, name: str, **facts: Any) -> dict[str, Any]:
        """The counts of a part, which may have been begun before."""
        return self.parts.setdefault(name, facts)

    def total(self, count: str) -> int:
        return sum(part.get(count, 0) for part in self.parts.values())

    def missing(self, name: str, batches: int) -> list[int]:
        """Those of the first so many batches of a part that were not run yet."""
        done = set(self.part(name).get("batches", ()))
        return [batch for batch in range(batches) if batch not in done]

    def ran(self, name: str, batch: int) -> None:
        part = self.part(name)
        part["batches"] = sorted([*part.get("batches", ()), batch])

    def add(self, name: str, counts: Mapping[str, int]) -> None:
        part = self.part(name)
        part.update(Counter({key: part.get(key, 0) for key in counts}) + Counter(counts))

    def fault(self, what: str, **facts: Any) -> None:
        self.faults.append({"what": placeless(what), **facts})

    @property
    def open_faults(self) -> list[dict[str, Any]]:
        """Those of which nothing is known to have become."""
        return [fault for fault in self.faults if "since" not in fault]

    def save(self) -> None:
        """Writes the file at once or not at all."""
        self._known["runs"][-1]["seconds"] = round(time.monotonic() - self._began)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text(json.dumps(self._known, indent=1) + "\n")
        os.replace(fresh, self.path)


def placeless(text: str) -> str:
    """The text without the folders of this machine."""
    text = re.sub(r"/[^\s\"']*/(?=site-packages/)", "", text)
    return re.sub(r"/tmp/[^\s\"'/]*/", "", text.replace(f"{ROOT}/", ""))

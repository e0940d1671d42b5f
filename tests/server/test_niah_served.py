"""`mminfer niah` from end to end: a needle model on a real server finds its needles."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_mminfer import cli

VIDEO = Path(__file__).parents[2] / "examples" / "needle_vlm" / "video"


def test_a_needle_model_finds_its_needles(tmp_path: Path) -> None:
    grid = ("--lengths", "1024", "2048", "--depths", "2", "--seeds", "3", "--concurrency", "3")
    assert (
        cli.main(["niah", "--model-path", str(VIDEO), "--mminfer-config", "default", *grid, "--out", str(tmp_path)])
        == 0
    )
    result = json.loads((tmp_path / "niah.json").read_text())
    found = result["servers"]["default"]
    assert result["settings"]["tasks"] == ["v-niah"]
    right = [cell["right"] for row in found["grid"]["v-niah"] for cell in row]
    assert [cell["answered"] for row in found["grid"]["v-niah"] for cell in row] == [3, 3, 3, 3]
    assert sum(right) >= 0.9 * 12, found["answers"]
    assert found["errors"] == []
    assert 1024 <= found["prompt_tokens"]["1024"] < 1100
    # Second turns have a cached prefix.
    assert all(answer["cached_tokens"] > 1000 for answer in found["answers"] if answer["turn"])
    assert [cell["answered"] for cell in found["over_cached_prefix"]["v-niah"].values()] == [3, 3]
    assert set(found["density"]) == {"1024", "2048"} and all(0 < value <= 1 for value in found["density"].values())
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")

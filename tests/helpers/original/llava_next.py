"""Makes llava_next.json: outputs of the original LLaVA-NeXT functions, to hold ours against.

    python tests/helpers/original/llava_next.py CHECKOUT > tests/helpers/original/llava_next.json

CHECKOUT is a folder with github.com/LLaVA-VL/LLaVA-NeXT at df17966. Its packages are not imported, because they need
a training environment: the functions are taken out of their files by name and run by themselves.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

SEED, SIDE, HIDDEN = 5, 5, 3
PINPOINTS = "(1x1),...,(6x6)"
PICTURES = [(300, 200), (900, 200), (1400, 1000), (384, 384), (5000, 300), (200, 3000), (1, 1), (4000, 4001)]


def functions(file: Path, names: list[str]) -> dict[str, Any]:
    """The functions of a file, methods among them, by name."""
    tree = ast.parse(file.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {"torch": torch, "nn": nn, "math": math, "re": re, "ast": ast}
    exec(compile(ast.Module(found, []), str(file), "exec"), space)
    return {name: space[name] for name in names}


def main(checkout: Path) -> None:
    model = functions(checkout / "llava/model/llava_arch.py", ["get_2dPool", "add_token_per_grid", "unpad_image"])
    names = ["select_best_resolution", "get_anyres_image_grid_shape"]
    sizes = functions(checkout / "llava/mm_utils.py", names)
    draw = torch.Generator().manual_seed(SEED)
    frames = torch.randn(2, SIDE, SIDE, HIDDEN, generator=draw)
    newline = torch.randn(HIDDEN, generator=draw)
    grid = {}
    for mode in ("average", "bilinear", "max"):
        stand_in = SimpleNamespace(
            config=SimpleNamespace(mm_spatial_pool_mode=mode),
            model=SimpleNamespace(image_newline=newline),
            get_vision_tower=lambda: SimpleNamespace(num_patches_per_side=SIDE),
        )
        smaller = model["get_2dPool"](stand_in, frames.flatten(1, 2))
        grid[mode] = model["add_token_per_grid"](stand_in, smaller).tolist()
    pictures = []
    for width, height in PICTURES:
        across, down = sizes["get_anyres_image_grid_shape"]((width, height), PINPOINTS, 384)
        _, h, w = model["unpad_image"](torch.zeros(1, down * 27, across * 27), (width, height)).shape
        times = math.sqrt(h * w / (9 * 27**2))  # "anyres_max_9"
        pictures.append([width, height, across, down, *((int(h // times), int(w // times)) if times > 1.1 else (h, w))])
    made = {"seed": SEED, "side": SIDE, "hidden": HIDDEN, "grid": grid, "pinpoints": PINPOINTS, "pictures": pictures}
    print(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

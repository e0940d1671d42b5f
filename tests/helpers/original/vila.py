"""Makes vila.json: outputs of VILA's own projectors, to hold ours against.

    python tests/helpers/original/vila.py CHECKOUT > tests/helpers/original/vila.json

CHECKOUT is a folder with github.com/NVlabs/VILA at b760c34. Its packages are not imported, because they need a
training environment: the blocks and the projector are taken out of their file by name and run by themselves.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from families.longvila import random_projector

INSIDE, OUTSIDE = 4, 6
KINDS = ("mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix")


def main(checkout: Path) -> None:
    file = checkout / "llava/model/multimodal_projector/base_projector.py"
    wanted = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    space: dict[str, Any] = {"torch": torch, "nn": nn, "re": re, "Mlp": None}
    space |= {"PretrainedConfig": object, "PreTrainedModel": Plain}
    exec(compile(ast.Module(wanted, []), str(file), "exec"), space)
    config = SimpleNamespace(mm_hidden_size=INSIDE, hidden_size=OUTSIDE)
    tokens: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        projector = space["MultimodalProjector"](SimpleNamespace(mm_projector_type=kind), config)
        projector.load_state_dict(random_projector(kind, INSIDE, OUTSIDE))
        for side in (4, 5):
            patches = torch.randn(1, side * side, INSIDE, generator=torch.Generator().manual_seed(side))
            with torch.no_grad():
                tokens.setdefault(kind, {})[str(side)] = projector(patches).tolist()
    print(json.dumps({"inside": INSIDE, "outside": OUTSIDE, "tokens": tokens}))


class Plain(nn.Module):
    """In place of transformers' base class."""

    def __init__(self, config: Any) -> None:
        super().__init__()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

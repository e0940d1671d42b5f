"""The command line of `mminfer basis`."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from sglang_mminfer import settings
from sglang_mminfer.patterns.basis import held
from sglang_mminfer.tools.errors import Failed

if TYPE_CHECKING:
    from sglang_mminfer.head_config import ModelFingerprint

RANK = 32
"""The usual rank of a file: patterns that ask for less use the first rows."""

SHOWN = (2, 4, 8, 16, 32)

WHAT_IT_IS = (
    "held: the share of the mean square of q . k, over independent pairs of a query and a key, that so many dimensions "
    "have (the squares of the singular values).\nIt tells nothing of single keys: what a head does with one key in a "
    "thousand may lie in directions that hold little, and a form of low rank does not see it then."
)

SERVER_FLAGS = (
    *("--attention-backend", "mminfer", "--mminfer-config", "dense"),
    *("--disable-radix-cache", "--skip-server-warmup", "--sleep-on-idle"),
)


Messages = list[dict[str, Any]]


class BasisError(Failed):
    """The command cannot go on; the message says why and what to do."""


def run(options: SimpleNamespace) -> int:
    """Calibrate, and write the basis. Returns exit status 0.

    Args:
        options: what `commands.basis` read, attributes of the options' names.

    Raises:
        BasisError, SearchError: it cannot go on; the message says why.
    """
    from transformers import AutoConfig

    from sglang_mminfer.head_config import HeadConfigError, ModelBasis, Provenance, fingerprint_of
    from sglang_mminfer.tools.basis import observer

    try:
        model = fingerprint_of(AutoConfig.from_pretrained(options.model_path))
    except (OSError, ValueError, HeadConfigError) as error:
        raise BasisError(f"{options.model_path}: expected a model: {error}") from None
    rank = options.rank or min(RANK, model.head_dim)
    if not 1 <= rank <= model.head_dim:
        raise BasisError(f"--rank: expected 1 to {model.head_dim} (the head dimension), got {rank}")
    with tempfile.TemporaryDirectory() as folder:
        names = _calibrate(options, Path(folder))
        q, k, shares, rows = observer.read(Path(folder), model.layers, model.heads, model.kv_heads)
    how = Provenance(
        "calibration",
        f"Made of the queries and keys of {rows:,} tokens, computed densely.",
        calibration=", ".join(names),
        date=datetime.date.today().isoformat(),
        details={"tokens": rows},
    )
    basis = ModelBasis.of_moments(model, how, q, k, rank).with_shares(shares, observer.default_rule())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    basis.save(options.out)
    words = [table(q, k, model), WHAT_IT_IS]
    if basis.shares is not None:
        mean = shares[q.flatten(1).any(dim=1)].mean()
        words.append(f"Query tiles of `default` visit {mean:.0%} of the keys between sink and window, mean over heads.")
    words.append(f"Basis: {options.out}   rank {rank}, {rows:,} tokens")
    print("\n".join(words), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps({"basis": str(options.out), "rank": rank, "tokens": rows, "calibration": names}, indent=1))
    return 0


def _calibrate(options: SimpleNamespace, folder: Path) -> list[str]:
    """Computes the conversations densely; moments go to the folder. Returns the conversations' names."""
    import openai

    from sglang_mminfer.tools.basis import observer
    from sglang_mminfer.tools.search.run import Calibration
    from sglang_mminfer.tools.server import Server, ServerError, shown_wait

    given = [Calibration.of_video(path) for path in options.video]
    given += [Calibration.of_file(path) for path in options.conversation]
    env = {settings.OBSERVERS.variable: f"{observer.OBSERVER}={folder}"}
    flags = (*SERVER_FLAGS, *shlex.split(options.server_flags))
    names = []
    try:
        with (
            shown_wait("the server starts:") as progress,
            Server(options.model_path, *flags, env=env, timeout=3600, progress=progress) as server,
        ):
            client = server.client(timeout=86400)

            def ask(messages: Messages, number: int) -> None:
                client.chat.completions.create(
                    model=server.model,
                    messages=messages,
                    max_tokens=1,
                    temperature=0,
                    extra_body={"rid": f"{observer.RID}-{number}"},
                )

            for number, calibration in enumerate(given):
                try:
                    ask(calibration.messages, number)
                except openai.APIError as error:
                    raise BasisError(f"{calibration.name}: the server refuses it: {error}") from None
                names.append(calibration.name)
            if not given:
                names.append(_clip(ask))
    except ServerError as error:
        raise BasisError(str(error)) from None
    return names


def _clip(ask: Callable[[Messages, int], None]) -> str:
    """Computes the built-in clip in the first size that the server takes. Returns its name."""
    import openai

    from sglang_mminfer.serving import clip

    why: Exception | None = None
    for number, size in enumerate(clip.SIZES):
        try:
            ask(clip.messages(size), number)
        except openai.APIError as error:
            why = error
        else:
            return f"built-in clip {clip.VERSION}: {size.frames} frames, {size.pictures} pictures"
    raise BasisError(f"the model takes no size of the built-in clip; give a --conversation that it takes: {why}")


def table(q: torch.Tensor, k: torch.Tensor, model: ModelFingerprint) -> str:
    """How much of q . k forms of some ranks hold in each layer: the mean over its KV heads, and the least.

    Args:
        q, k: float64 [layers, heads, D, D] and [layers, kv_heads, D, D], second moments.
    """
    ranks = [rank for rank in SHOWN if rank <= model.head_dim]
    lines = ["layer  " + "".join(f"  rank {rank:<2d} mean  least" for rank in ranks)]
    by_layer = []
    for number in model.attention_layers:
        if not q[number].any():
            lines.append(f"{number:5d}    not shown: its attention is no plain one")
            continue
        shares = held(q[number], k[number])[:, [rank - 1 for rank in ranks]]
        by_layer.append(shares)
        lines.append(f"{number:5d}  " + _row(shares))
    if by_layer:
        lines.append("  all  " + _row(torch.cat(by_layer)))
    return "\n".join(lines)


def _row(shares: torch.Tensor) -> str:
    return "".join(f"  {mean:12.1%} {least:6.1%}" for mean, least in zip(shares.mean(0), shares.amin(0)))

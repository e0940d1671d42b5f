"""The command line of `mminfer basis`."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang_mminfer import settings
from sglang_mminfer.head_config.basis_file import ENDING
from sglang_mminfer.patterns.basis import held

if TYPE_CHECKING:
    from sglang_mminfer.head_config import ModelFingerprint

DESCRIPTION = (
    "Computes calibration conversations densely, in a real server, and writes the low-rank forms of q . k by which "
    "`adaptive` heads choose keys. Put the file beside a head config, or name it in SGLANG_MMINFER_BASIS."
)

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


class BasisError(RuntimeError):
    """The command cannot go on; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.description = DESCRIPTION
    parser.add_argument("--model-path", required=True, metavar="P", help="a model directory, or its name on the hub")
    parser.add_argument("--video", type=Path, action="append", default=[], help="a calibration video; may be repeated")
    parser.add_argument(
        "--conversation",
        type=Path,
        action="append",
        default=[],
        help="a JSON list of OpenAI messages; may be repeated. Default: the clip that a server sends itself",
    )
    parser.add_argument("--out", type=Path, default=Path(f"model{ENDING}"), help=f"where the basis goes: NAME{ENDING}")
    parser.add_argument("--rank", type=int, help=f"dimensions of a form (default: {RANK}, at most the head's)")
    parser.add_argument(
        "--server-args", nargs=argparse.REMAINDER, default=[], help="further flags of the SGLang server"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit status: 1 if it cannot go on, else 0."""
    from sglang_mminfer.tools.search.run import SearchError

    try:
        _run(options)
    except (BasisError, SearchError) as error:
        print(f"mminfer basis: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from sglang_mminfer.head_config import HeadConfigError, ModelBasis, Provenance, fingerprint_of
    from sglang_mminfer.tools.basis import observer

    if not options.out.name.endswith(ENDING):
        raise BasisError(f"--out: expected a name that ends in {ENDING}, got {options.out.name}")
    for path in (*options.video, *options.conversation):
        if not path.is_file():
            raise BasisError(f"{path}: no such file")
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
        f"Of the queries and keys of {rows:,} tokens, computed densely.",
        calibration=", ".join(names),
        date=datetime.date.today().isoformat(),
        details={"tokens": rows},
    )
    basis = ModelBasis.of_moments(model, how, q, k, rank).with_shares(shares, observer.default_rule())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    basis.save(options.out)
    print(table(q, k, model))
    print(WHAT_IT_IS)
    if basis.shares is not None:
        mean = shares[q.flatten(1).any(dim=1)].mean()
        print(f"Query tiles of `default` visit {mean:.0%} of the keys between sink and window, mean over heads.")
    print(f"Basis: {options.out}   rank {rank}, {rows:,} tokens")


def _calibrate(options: argparse.Namespace, folder: Path) -> list[str]:
    """Computes the conversations densely; moments go to the folder. Returns the conversations' names."""
    import openai

    from sglang_mminfer.tools.basis import observer
    from sglang_mminfer.tools.search.run import Calibration
    from sglang_mminfer.tools.server import Server, ServerError, shown_wait

    given = [Calibration.of_video(path) for path in options.video]
    given += [Calibration.of_file(path) for path in options.conversation]
    env = {settings.OBSERVERS.variable: f"{observer.OBSERVER}={folder}"}
    names = []
    try:
        with (
            shown_wait("the server starts:") as progress,
            Server(
                options.model_path, *SERVER_FLAGS, *options.server_args, env=env, timeout=3600, progress=progress
            ) as server,
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
    for number in range(model.layers):
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

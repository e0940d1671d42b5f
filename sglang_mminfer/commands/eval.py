"""The words of `mminfer eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_mminfer import settings
from sglang_mminfer.commands import options
from sglang_mminfer.commands.compare import BASELINES, configs_or_baselines
from sglang_mminfer.commands.parsing import Refused, bad

PAPER = (
    *("videomme", "videomme-long", "longvideobench", "mlvu", "egoschema", "nextqa", "activitynetqa", "perceptiontest"),
    "videodc",
)
NEEDLES = ("v-niah", "v-relay", "mm-niah", "mm-relay")
"""The aliases of `tools.evaluation.tasks`."""


def _urls(named: list[str]) -> list[str]:
    for text in named:
        name, equals, url = text.partition("=")
        if not name or not equals or not options.is_url(url):
            raise bad(f"expected NAME=URL, something like dense=http://127.0.0.1:30000, got {text}")
    names = [text.partition("=")[0] for text in named]
    if len(set(names)) < len(names):
        raise bad(f"expected different names, got {', '.join(names)}")
    return named


def _margin(points: float) -> float:
    if not 0 < points < 100:
        raise bad(f"expected points between 0 and 100, got {points:g}")
    return points


def _folders(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_dir():
            raise bad(f"{path}: no such folder")
    return paths


def evaluate(
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="TASK...",
            help=f"{', '.join(PAPER)}; needles: {', '.join(NEEDLES)}; or any task of lmms-eval",
        ),
    ],
    model_path: options.ServedModel = None,
    mminfer_config: Annotated[
        list[str],
        typer.Option(
            settings.CONFIG.flag,
            metavar="NAME|PATH...",
            callback=configs_or_baselines,
            help=f"head configs, or baselines: {', '.join(BASELINES)}; dense always comes with them (default: default)",
            rich_help_panel=options.SERVERS,
        ),
    ] = [],
    server_flags: options.ServerFlags = "",
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="the most frames of a video, of servers that are started (default: SGLang's)",
            rich_help_panel=options.SERVERS,
        ),
    ] = None,
    url: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=URL",
            callback=_urls,
            help="a running server on this machine, and its name in tables; may be repeated",
            rich_help_panel=options.SERVERS,
        ),
    ] = [],
    model: options.NameToAskFor = None,
    api_key: options.ApiKey = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="questions of each task (default: all)")] = None,
    conversation: Annotated[
        bool, typer.Option("--conversation", help="ask all questions about a video as turns of one chat")
    ] = False,
    margin: Annotated[
        float, typer.Option(metavar="POINTS", callback=_margin, help="not worse than dense by more than this")
    ] = 1.0,
    include_path: Annotated[
        list[Path], typer.Option(metavar="DIR", callback=_folders, help="further tasks of lmms-eval; may be repeated")
    ] = [],
    lmms_eval: Annotated[
        str | None, typer.Option(metavar="PROGRAM", help="lmms-eval (default: on PATH, or of `make setup-eval`)")
    ] = None,
    lengths: options.Lengths = [8192],
    depths: options.Depths = 8,
    seeds: options.Seeds = 8,
    seed: options.Seed = 1,
    needles: options.Needles = None,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="requests side by side")] = 4,
    timeout: options.Timeout = 3600,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for eval.json, .md, .png and the answers")] = Path(
        "eval-out"
    ),
    json: options.AsJson = False,
) -> int:
    """Video QA and captioning, dense beside sparse: scores, what they took, and whether a config is worse than dense.

    Serves a model with one head config after the other (or asks running servers), asks each all questions of some tasks
    with lmms-eval, and compares each config with dense question by question: differences with intervals, p-values and a
    verdict. lmms-eval has an environment of its own (`make setup-eval`). Resumable: nothing that was answered is asked
    again. The needle tasks take lengths, depths, seeds and needles.
    """
    if bool(url) == bool(model_path):
        raise Refused("name running servers with --url, or a model to serve with --model-path; one of the two")
    if mminfer_config and not model_path:
        raise Refused("--mminfer-config is for servers that are started: give --model-path, too")
    if frames is not None and not model_path:
        raise Refused("--frames is for servers that are started; a running one has --mm-process-config")
    if len(set(tasks)) != len(tasks):
        raise Refused(f"--tasks: expected none twice, got {', '.join(tasks)}")
    from sglang_mminfer.tools.evaluation.run import Options, run

    return run(
        Options(
            tasks=tuple(tasks),
            out=out,
            model_path=model_path,
            configs=tuple(mminfer_config),
            urls={name: address for name, _, address in (text.partition("=") for text in url)},
            model=model,
            server_flags=server_flags,
            include=tuple(include_path),
            limit=limit,
            frames=frames,
            conversation=conversation,
            margin=margin,
            concurrency=concurrency,
            timeout=timeout,
            lengths=tuple(lengths),
            depths=depths,
            seeds=seeds,
            seed=seed,
            kit=needles,
            lmms_eval=lmms_eval,
            api_key=api_key,
            json=json,
        )
    )

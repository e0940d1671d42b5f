"""`mminfer inspect`: draws what the heads of a model do with a prompt, or what a server's trace tells of its requests.

With a model, the command starts a server with the same flags as in production, sends one prompt, and stops the server.
Inside the server, `inspect/capture.py` records what is drawn here.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from sglang_mminfer.serving.trace import (
    LayerAudit,
    MapEntry,
    PrefillRecord,
    density_of_records,
    map_of_entries,
    read_trace,
)
from sglang_mminfer.tools.errors import Failed

RID = "mminfer-inspect"
MOST_HEADS = 6


class InspectError(Failed):
    """An error that the user can mend. The message says how."""


def run(options: SimpleNamespace) -> int:
    """Draw, and print the page's path. Returns exit status 0.

    Args:
        options: what `commands.inspect` read, attributes of the options' names.

    Raises:
        InspectError: it cannot be drawn; the message says why.
    """
    try:
        page = from_trace(options) if options.trace else from_model(options)
    except ValueError as error:  # a trace or a head config that holds something else
        raise InspectError(str(error)) from None
    print(
        json.dumps({"page": str(page), "pictures": sorted(map(str, page.parent.glob("*.png")))}, indent=1)
        if options.json
        else page
    )
    return 0


def conversation(options: SimpleNamespace) -> list[dict[str, Any]]:
    """The OpenAI messages that the options name.

    Raises:
        InspectError: there is nothing to look at, or a file does not exist or holds something else.
    """
    if options.messages is not None:
        try:
            messages = json.loads(options.messages.read_text())
        except (OSError, ValueError) as error:
            raise InspectError(f"--messages {options.messages}: {error}") from None
        if (
            not isinstance(messages, list)
            or not all(isinstance(m, dict) and "role" in m for m in messages)
            or not messages
        ):
            raise InspectError(f"--messages {options.messages}: expected a list of messages with role and content")
        return messages
    parts: list[dict[str, Any]] = []
    for kind in ("video", "image"):
        for name in getattr(options, kind):
            if "://" not in name and not Path(name).is_file():
                raise InspectError(f"--{kind} {name}: no such file")
            url = name if "://" in name else str(Path(name).resolve())
            parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    if not parts:
        raise InspectError("nothing to look at: give --video, --image or --messages")
    return [{"role": "user", "content": [*parts, {"type": "text", "text": options.text}]}]


def default_heads(patterns: Sequence[Sequence[Any]], most: int = MOST_HEADS) -> list[tuple[int, int]]:
    """One (layer, head) of each pattern, at most `most`, sparse patterns before dense ones.

    Each is the middle one of all heads with the pattern.
    """
    heads_of: dict[Any, list[tuple[int, int]]] = {}
    for layer, row in enumerate(patterns):
        for head, pattern in enumerate(row):
            heads_of.setdefault(pattern, []).append((layer, head))
    order = sorted(heads_of, key=lambda pattern: (pattern.kind == "dense", heads_of[pattern][0]))
    return sorted(heads_of[pattern][len(heads_of[pattern]) // 2] for pattern in order[:most])


# ---- a model ---------------------------------------------------------------------------------------------------


def from_model(options: SimpleNamespace) -> Path:
    """Start a server, send one prompt, and draw. Returns the path of the page.

    Raises:
        InspectError: the arguments do not make sense, the server failed, or nothing was recorded.
    """
    from transformers import AutoConfig

    from sglang_mminfer.head_config import HeadConfig
    from sglang_mminfer.tools.inspect.capture import REQUEST, Request

    messages = conversation(options)
    config = HeadConfig.load(options.mminfer_config).bind(AutoConfig.from_pretrained(options.model_path))
    patterns = [config.patterns(layer) for layer in range(config.num_layers or 0)]
    heads = options.heads or default_heads(patterns)
    for layer, head in heads:
        if not (0 <= layer < len(patterns) and 0 <= head < len(patterns[layer])):
            shape = f"{len(patterns)} layers of {config.num_heads} heads, counted from 0"
            if config.full_layers is not None:
                shape += f"; those with attention are {', '.join(map(str, config.full_layers))}"
            raise InspectError(f"--heads {layer}:{head}: the model has {shape}")
    with tempfile.TemporaryDirectory(prefix="mminfer-inspect-") as name:
        folder = Path(name)
        (folder / REQUEST).write_bytes(msgspec.json.encode(Request(RID, list(heads), rows=options.rows)))
        _ask(options, messages, folder)
        return draw(folder, config, heads, options.out, f"{Path(options.model_path).name}, {config.name}")


def _ask(options: SimpleNamespace, messages: list[dict[str, Any]], folder: Path) -> None:
    """Prefill the prompt once in a real server, which writes its record and its trace to `folder`."""
    import shlex

    from sglang_mminfer import settings
    from sglang_mminfer.tools.inspect import capture
    from sglang_mminfer.tools.server import Server, ServerError, shown_wait

    flags = shlex.split(options.server_flags)
    flags = ["--attention-backend", "mminfer", "--mminfer-config", options.mminfer_config, *flags]
    env: dict[str, str | None] = {
        settings.OBSERVERS.variable: f"{capture.__name__}:create={folder}",
        settings.TRACE.variable: str(folder / "trace.jsonl"),
        settings.SPARSE.variable: "always",  # it shows what heads do, in short prompts, too
    }
    if not Path(options.model_path).is_dir():
        env |= {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    try:
        with (
            shown_wait("starting the server") as progress,
            Server(options.model_path, *flags, env=env, progress=progress) as server,
        ):
            server.flush_cache()  # the warm-up left the chat template's beginning in the radix cache
            server.client().chat.completions.create(
                model="default", messages=messages, max_tokens=1, temperature=0, extra_body={"rid": RID}
            )
            _wait_for_answer(folder)
    except ServerError as error:
        raise InspectError(str(error)) from None


def _wait_for_answer(folder: Path) -> None:
    """Wait until all ranks have written: the server answers a moment before that."""
    until = time.monotonic() + 30
    while not _complete(folder):
        if time.monotonic() > until:
            records = [r for r in read_trace(folder / "trace.jsonl") if r.rid == RID]
            reasons = sorted({r.dense_reason or "sparse" for r in records})
            raise InspectError(f"nothing was taken down of this prompt; it ran: {', '.join(reasons) or 'not at all'}")
        time.sleep(0.1)


def _overviews(folder: Path) -> list[Path]:
    """The files that the ranks wrote, in the order of the ranks."""
    return sorted(folder.glob("overview-*.json"), key=lambda path: int(path.stem.split("-")[1]))


def _complete(folder: Path) -> bool:
    paths = _overviews(folder)
    return bool(paths) and len(paths) == int(paths[0].stem.split("-")[3])


def draw(folder: Path, config: Any, heads: Sequence[tuple[int, int]], out: Path, title: str) -> Path:
    """Draw the pictures and the page of the record in `folder`. Returns the path of the page."""
    from sglang_mminfer.head_config import words_of
    from sglang_mminfer.modality.segments import ModalityMap, Segment
    from sglang_mminfer.planning.visited import order_of
    from sglang_mminfer.tools.figures import save, turn_of_records
    from sglang_mminfer.tools.inspect import figures
    from sglang_mminfer.tools.inspect.capture import MAP
    from sglang_mminfer.tools.inspect.reasons import account, reasons_by_row
    from sglang_mminfer.tools.page import Page

    modality_map = ModalityMap(msgspec.json.decode((folder / MAP).read_bytes(), type=list[Segment]))
    records = [r for r in read_trace(folder / "trace.jsonl") if r.rid == RID]
    ran_dense = all(r.dense_reason is not None for r in records)
    out.mkdir(parents=True, exist_ok=True)
    page = Page(f"mminfer inspect: {title}")
    page.heading("The prompt")
    page.note(
        f"{modality_map.length:,} tokens in {len(modality_map.segments)} segments, prefilled in {len(records)} chunks."
    )
    page.picture(
        save(figures.map_figure(modality_map, turn_of_records("prompt", records)), out / "map.png"), "modality map"
    )
    _chunks(page, records)

    page.heading("All heads")
    page.note("Recall and error are measured on up to 64 rows of each chunk, spread over all modalities and positions.")
    layers, overview = _overview(folder)
    path = save(figures.overview_figure(*overview, layers=layers), out / "overview.png", dpi=130)
    page.picture(path, "density, recall and error of all heads")

    page.note(
        "The pictures of single heads follow. Above the tokens stand in the order of the prompt, below in the order in "
        "which the head's pattern lays them out, rows and keys alike. White: no causal pairs. Bands: the modality."
    )
    for layer, head in heads:
        source = folder / f"head-{layer}-{head}.npz"
        pattern = config.patterns(layer)[head]
        if not source.exists():
            page.heading(f"Layer {layer}, head {head}")
            page.note("Not taken down: this layer is not plain causal attention over the KV pool.")
            continue
        data = _load(source, layer, head, words_of(pattern), order_of(modality_map, pattern)[1])
        page.heading(f"Layer {layer}, head {head}")
        page.table(
            ["pattern", "density", "recall", "worst row's recall", "output error"],
            [[data.words, data.density, data.mean_recall, float(data.recall.min()), data.relative_error]],
        )
        path = save(figures.head_figure(data, modality_map), out / f"head-{layer}-{head}.png", dpi=110)
        page.picture(path, f"attention and visited tiles of layer {layer}, head {head}")
        dense_below = config.defaults.dense_below
        reasons = reasons_by_row(modality_map, pattern, dense_below, data.visited_by_row, data.first_row, ran_dense)
        path = save(figures.rows_figure(data, modality_map, reasons), out / f"rows-{layer}-{head}.png", dpi=110)
        page.picture(path, f"recall and density along the prompt, layer {layer}, head {head}")
        page.table(
            ["why rows saw everything", "rows", "share of the visited pairs"],
            [[entry.reason, entry.rows, entry.pairs] for entry in account(reasons, data.visited_by_row)],
        )
    return page.write(out / "inspect.html")


def _load(source: Path, layer: int, head: int, words: str, order: np.ndarray) -> Any:
    from sglang_mminfer.tools.inspect.figures import HeadData

    with np.load(source) as saved:
        squares = {
            key: {name: saved[f"{key}_{name}"] for name in ("mass", "lost", "visited", "causal")}
            for key in ("original", "permuted")
        }
        rows = {name: saved[name] for name in ("position", "recall", "error", "norm", "visited_by_row")}
        first = int(saved["first_row"])
        return HeadData(layer, head, words, str(saved["order_name"]), order, squares, **rows, first_row=first)


def _overview(folder: Path) -> tuple[list[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The layers, and density, recall and error [layers, heads], of all ranks."""
    ranks = [json.loads(path.read_text()) for path in _overviews(folder)]
    layers = sorted(int(layer) for layer in ranks[0])

    def mosaic(name: str) -> np.ndarray:
        return np.array([[value for rank in ranks for value in rank[str(layer)][name]] for layer in layers])

    return layers, (mosaic("density"), mosaic("recall"), mosaic("error"))


def _chunks(page: Any, records: Sequence[PrefillRecord]) -> None:
    page.table(
        ["request", "cached", "new tokens", "layers sparse", "density", "ran dense because of"],
        [[r.rid, r.prefix_len, r.chunk_len, r.sparse_layers, r.density, r.dense_reason or ""] for r in records],
    )


# ---- a trace ---------------------------------------------------------------------------------------------------


def from_trace(options: SimpleNamespace) -> Path:
    """Draw maps, chunks, density, dense reasons and audits of a trace, which has no attention. Returns the page's path.

    Raises:
        InspectError: the trace has no such request.
    """
    from sglang_mminfer.tools.figures import save, turn_of_records
    from sglang_mminfer.tools.inspect import figures
    from sglang_mminfer.tools.page import Page

    by_rid: dict[str, list[PrefillRecord]] = {}
    for record in read_trace(options.trace):
        by_rid.setdefault(record.rid, []).append(record)
    chosen = by_rid if options.rid is None else {k: v for k, v in by_rid.items() if k == options.rid}
    if not chosen:
        last_rids = ", ".join(list(by_rid)[-5:]) or "none"
        raise InspectError(f"--trace {options.trace}: no request {options.rid or ''}; the last ones are: {last_rids}")
    options.out.mkdir(parents=True, exist_ok=True)
    page = Page(f"mminfer inspect: {len(chosen)} requests of a trace")
    page.heading("Requests")
    page.table(
        ["request", "tokens", "new", "density", "ran dense because of"],
        [
            [rid, rs[-1].seq_len, sum(r.chunk_len for r in rs), density_of_records(rs), _reasons(rs)]
            for rid, rs in chosen.items()
        ],
    )
    last = list(chosen.items())[-MOST_HEADS:]
    if len(last) < len(chosen):
        page.note(f"The last {len(last)} follow in detail; --rid names another.")
    for number, (rid, records) in enumerate(last):
        page.heading(rid)
        entries: list[MapEntry] = next((r.map for r in records if r.map), [])
        if entries:
            try:
                turn = turn_of_records("prompt", records)
            except ValueError:  # after a retraction, a request's chunks do not follow each other
                turn = turn_of_records("prompt", [])
            path = save(figures.map_figure(map_of_entries(entries), turn), options.out / f"map-{number}.png")
            page.picture(path, f"modality map of {rid}")
        _chunks(page, records)
        _audits(page, records)
    return page.write(options.out / "inspect.html")


def _reasons(records: Sequence[PrefillRecord]) -> str:
    return ", ".join(sorted({r.dense_reason for r in records if r.dense_reason}))


def _audits(page: Any, records: Sequence[PrefillRecord]) -> None:
    rows = [
        [r.prefix_len, a.layer, _heads(a), a.rows, a.error_mean, a.error_max, a.worst_head, a.recall_mean, a.recall_min]
        for r in records
        for a in r.audit or []
    ]
    if rows:
        page.table(
            ["chunk at", "layer", "heads", "rows", "error, mean", "worst", "of head", "recall, mean", "worst"],
            rows,
        )


def _heads(audit: LayerAudit) -> str:
    """The heads that an audit covers: all heads of the model if the ranks' trace files lie beside this one."""
    return f"{audit.first_head} to {audit.first_head + audit.num_heads - 1}" if audit.num_heads else "of rank 0"

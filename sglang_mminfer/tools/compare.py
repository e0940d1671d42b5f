"""`mminfer compare`: head configs side by side on needle tasks, each in a real SGLang server with the plugin.

For every config it measures which share of the needles is found (`niah`) and, from the server's trace, the density
and the time of a prefill. Servers run one after the other, and each gets one request at a time. The result file is
written after every config, and a config that is in the file is not run again, so the same command continues where it
was stopped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from sglang_mminfer import settings
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.serving.trace import PrefillRecord, density_of_records, read_trace
from sglang_mminfer.tools import baselines, verdicts
from sglang_mminfer.tools.errors import Refused
from sglang_mminfer.tools.needles import kits
from sglang_mminfer.tools.niah import ask as niah
from sglang_mminfer.tools.niah.against import compared
from sglang_mminfer.tools.niah.ask import Answer, Cell, Media, Settings, Target
from sglang_mminfer.tools.niah.command import (
    ask_with_progress,
    check_config,
    kit_of,
    percent,
    provenance,
    server_flags,
    settings_of,
    unique,
    wide_console,
    write_json,
)
from sglang_mminfer.tools.niah.figure import TITLES, draw
from sglang_mminfer.tools.server import Server, ServerError, shown_wait

CLOSE = 0.1
"""The relative error up to which an estimated pattern's density fits. Only a server can tell what it visits."""
FITS = 4
"""How many servers the fit may take."""


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    config:   the value of --mminfer-config; empty for a baseline that is sized first.
    baseline: the baseline to size, if --density is given.
    """

    name: str
    config: str
    baseline: str | None = None


def run(options: SimpleNamespace) -> int:
    """Serve each config, and write table, picture and file. Returns exit status 0.

    Args:
        options: what `commands.compare` read, attributes of the options' names.

    Raises:
        Failed: a server did not start or did not answer.
        Refused: the options do not make sense, or the result file belongs to others.
    """
    try:
        Comparison(options, wide_console(options.json)).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    return 0


class Comparison:
    """One run of the command.

    Raises:
        Refused: the arguments do not make sense, or the result file belongs to other arguments.
    """

    def __init__(self, options: SimpleNamespace, console: Console) -> None:
        self.options, self.console, self.out = options, console, options.out
        self.kit = kit_of(options.needles, [options.model_path])
        self.settings = settings_of(options, self.kit, options.model_path, options.relays)
        self.entries = entries_of(options.mminfer_config, options.add, options.density)
        self.media = Media(self.settings, self.kit, self.out / "media")
        self.file = self.out / "compare.json"
        self.result = self._begin()

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for entry in self.entries:
            if entry.name in self.result["configs"]:
                self.console.print(f"{entry.name}: in {self.file} already", highlight=False)
                continue
            self.result["configs"][entry.name] = self._measure(entry)
            write_json(self.file, self.result)
        results = {entry.name: self.result["configs"][entry.name] for entry in self.entries}
        rows = table_of(results, self.settings)
        answers_of = answers_in(results)
        baseline, comparisons = compared(answers_of)
        self.result["compared"] = verdicts.to_json(comparisons, baseline)
        write_json(self.file, self.result)
        (self.out / "compare.md").write_text(verdicts.markdown(rows) + verdicts.markdown_section(comparisons, baseline))
        self.console.print(verdicts.rich_table(rows, "Needles found, and what it took"))
        verdicts.printed(self.console, comparisons, baseline)
        grids = {name: niah.cells(answers, self.settings) for name, answers in answers_of.items()}
        picture = draw(grids, self.settings, self.out / "compare.png")
        self.console.print(f"written: {self.file}, {self.out / 'compare.md'}, {picture}", highlight=False)
        if self.options.json:
            print(json.dumps(self.result, indent=1, ensure_ascii=False))

    def _begin(self) -> dict[str, Any]:
        question = {
            "model": Path(self.options.model_path).name,
            "needles": self.kit.name,
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "density": self.options.density,
            "server_flags": self.options.server_flags,
            "concurrency": self.options.concurrency,
        }
        if not self.file.exists():
            return {**provenance("compare"), **question, "configs": {}}
        try:
            result = json.loads(self.file.read_text())
            differing = [key for key, value in question.items() if result[key] != value]
            configs: dict[str, Any] = result["configs"]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{self.file}: no result of this command ({error}); name another --out") from None
        if differing:
            raise Refused(f"{self.file}: was made with other {', '.join(differing)}; name another --out or remove it")
        return {**result, "configs": configs}

    def _measure(self, entry: Entry) -> dict[str, Any]:
        """Ask a server with one config all questions. An estimated baseline is first fitted to the given density."""
        config, budget = entry.config, 0
        if entry.baseline is not None:
            baseline, budget = baselines.sized_for(entry.baseline, self.options.density, self._longest_map())
            config = self._write(baseline)
        for fit in range(FITS):
            trace = self.out / "logs" / f"{entry.name}.trace.jsonl"
            trace.parent.mkdir(parents=True, exist_ok=True)
            trace.unlink(missing_ok=True)
            flags = ("--attention-backend", "mminfer", "--mminfer-config", config)
            with contextlib.ExitStack() as stack:
                with shown_wait(f"{entry.name}: server starts") as wait:
                    server = Server(
                        self.options.model_path,
                        *(*flags, *server_flags(self.options, self.kit)),
                        log=self.out / "logs" / f"{entry.name}.log",
                        # Configs are compared by what their heads do, not by where they would run dense.
                        env={settings.TRACE.variable: str(trace.resolve()), settings.SPARSE.variable: "always"},
                        progress=wait,
                    )
                    stack.enter_context(server)
                target = Target(entry.name, server.client(self.options.timeout), server.model)
                visited = self._warm_up(target, trace)
                if entry.baseline == "minference" and fit < FITS - 1 and not self._close(visited):
                    budget = max(1, round(budget * min(4.0, self.options.density / visited)))
                    config = self._write(baselines.with_budget(entry.baseline, budget, self._longest_map()))
                    self.console.print(f"{entry.name}: visited {visited:.3f}, again with {budget}", highlight=False)
                    continue
                server.flush_cache()
                answers = ask_with_progress(target, self.media, self.options.concurrency, self.console)
                return self._figures(entry, config, answers, read_trace(trace) if trace.exists() else [])
        raise AssertionError("the last fit is taken as it is")

    def _close(self, visited: float) -> bool:
        density = self.options.density
        return density is None or not visited or abs(visited / density - 1) <= CLOSE

    def _warm_up(self, target: Target, trace: Path) -> float:
        """Send one prompt of the greatest length, whose time does not count. Returns its density, 0 if unknown."""
        case = self.settings.cases[-1]
        messages = self.media.messages(case)
        response = target.client.chat.completions.create(
            model=target.model, messages=messages[:1], max_tokens=1, temperature=0
        )
        records = read_trace(trace) if trace.exists() else []
        return density_of_records(r for r in records if r.rid == response.id) or 0.0

    def _longest_map(self) -> Any:
        return kits.prompt_map(self.settings.conversation(self.settings.cases[-1]).conversation, self.kit)

    def _write(self, config: HeadConfig) -> str:
        path = self.out / "configs" / f"{config.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        config.save(path)
        return str(path.resolve())

    def _figures(
        self, entry: Entry, config: str, answers: list[Answer], records: list[PrefillRecord]
    ) -> dict[str, Any]:
        if all(answer.error for answer in answers):
            raise ServerError(f"{entry.name} answered nothing: {answers[0].error}")
        return {
            "config": json.loads(HeadConfig.load(config).to_json()),
            "by_length": {str(n): prefill_figures(answers, records, n) for n in self.settings.lengths},
            **niah.report(answers, self.settings),
        }


def entries_of(names: Sequence[str] | None, more: Sequence[str], density: float | None) -> list[Entry]:
    """The rows of the table.

    Raises:
        Refused: a name is neither a config nor a baseline, or is a baseline that needs a density.
    """
    chosen = list(names or ["dense", "default", *(n for n in baselines.NAMES if density or n in baselines.PUBLISHED)])
    entries: dict[str, Entry] = {}
    for name in [*chosen, *more]:
        label = unique(Path(name).stem, entries)
        if name not in baselines.NAMES:
            check_config(name)
            entries[label] = Entry(label, name)
        elif density is not None:
            entries[label] = Entry(label, "", name)
        elif name in baselines.PUBLISHED:
            entries[label] = Entry(label, f"baseline_{name}")
        else:
            raise Refused(f"--mminfer-config: {name} has no published sizes; give --density")
    return list(entries.values())


def answers_in(configs: dict[str, Any]) -> dict[str, list[Answer]]:
    """Every config's answers, from a result file."""
    return {name: [Answer(**answer) for answer in figures["answers"]] for name, figures in configs.items()}


def prefill_figures(answers: Sequence[Answer], records: Sequence[PrefillRecord], length: int) -> dict[str, Any]:
    """Figures of the conversations of one length.

    density:              over all rows that these conversations computed.
    dense_reasons:        why chunks ran dense.
    prompt_tokens:        tokens of a first prompt, the mean.
    forward_ms, attn_ms:  the whole forward pass of a first prompt and its attention, over all its chunks, the mean.

    A figure is None if the trace has no record for it.
    """
    answered = [a for a in answers if a.length == length and a.error is None]
    by_rid: dict[str, list[PrefillRecord]] = {}
    for record in records:
        by_rid.setdefault(record.rid, []).append(record)
    new_rows = [record for answer in answered for record in by_rid.get(answer.request_id, [])]
    first: dict[tuple[str, int], Answer] = {}
    for answer in answered:
        first.setdefault((answer.task, answer.seed), answer)
    first_prompts = [by_rid[a.request_id] for a in first.values() if a.request_id in by_rid]
    reasons = sorted({record.dense_reason for record in new_rows if record.dense_reason})
    return {
        "density": _rounded(density_of_records(new_rows), 4),
        "dense_reasons": reasons,
        "prompt_tokens": _rounded(_mean([sum(r.chunk_len for r in records) for records in first_prompts]), 0),
        "forward_ms": _rounded(_mean([sum(r.forward_ms for r in records) for records in first_prompts]), 1),
        "attn_ms": _rounded(_mean([sum(r.attn_ms for r in records) for records in first_prompts]), 1),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


# ---- the table -----------------------------------------------------------------------------------------------


def table_of(configs: dict[str, Any], settings: Settings) -> list[list[str]]:
    """The table as rows of cells, the heading first."""
    tasks = [(task, length) for task in settings.tasks for length in settings.lengths]
    heading = ["config", *(f"density, {length:,}" for length in settings.lengths)]
    heading += [f"{TITLES[task]}, {length:,}" for task, length in tasks]
    heading += [f"prefill ms, {length:,}" for length in settings.lengths] + ["errors"]
    rows = [heading]
    for name, result in configs.items():
        figures = [result["by_length"][str(length)] for length in settings.lengths]
        accuracy = [Cell(**result["accuracy"][task][str(length)]) for task, length in tasks]
        rows.append(
            [
                name,
                *("–" if f["density"] is None else f"{f['density']:.3f}" for f in figures),
                *(percent(cell) for cell in accuracy),
                *("–" if f["forward_ms"] is None else f"{f['forward_ms']:,.0f}" for f in figures),
                str(sum(cell.errors for cell in accuracy)),
            ]
        )
    return rows

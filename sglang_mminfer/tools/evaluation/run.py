"""One run of `mminfer eval`: a server for each config, lmms-eval against each, and what that says together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_mminfer import settings
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.tools import connections, paired, verdicts
from sglang_mminfer.tools.compare import Entry, entries_of
from sglang_mminfer.tools.errors import Refused
from sglang_mminfer.tools.evaluation import figure, lmms, measured, needle_tasks
from sglang_mminfer.tools.evaluation.lmms import LmmsError
from sglang_mminfer.tools.evaluation.tasks import JUDGE_KEYS, NEEDLES, NoScore, Task, task_of
from sglang_mminfer.tools.needles.kits import KITS, Kit
from sglang_mminfer.tools.niah.ask import Settings
from sglang_mminfer.tools.niah.command import (
    check_config,
    kit_of,
    provenance,
    target_of,
    telemetry_of,
    wide_console,
    write_json,
)
from sglang_mminfer.tools.server import Server, shown_wait
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry


@dataclass(frozen=True)
class Options:
    """What a user asks for.

    Attributes:
        model_path, configs, server_flags: servers to start, one after another; `dense` is always among them.
        urls: running servers, by the names that they get in tables.
        tasks: aliases of `tasks.PAPER` and `tasks.NEEDLES`, or names of lmms-eval's own.
        include: folders with further tasks.
        limit: questions of each task; None: all.
        frames: the most frames of a video, for servers that are started; None: the server's default.
        conversation: ask all questions about a video as turns of one chat.
        margin: of the verdict, in points.
        concurrency: requests side by side. timeout: seconds for an answer.
        needles: of our own tasks; kit: `cards`, `glyphs`, or None for what the model is.
        lmms_eval: the program; None: what is found.
        api_key: of running servers. json: print the result as one JSON document.
    """

    tasks: tuple[str, ...]
    out: Path
    model_path: str | None = None
    configs: tuple[str, ...] = ()
    urls: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    server_flags: str = ""
    include: tuple[Path, ...] = ()
    limit: int | None = None
    frames: int | None = None
    conversation: bool = False
    margin: float = 100 * paired.MARGIN
    concurrency: int = 4
    timeout: float = 3600.0
    lengths: tuple[int, ...] = (8192,)
    depths: int = 8
    seeds: int = 8
    seed: int = 1
    kit: str | None = None
    lmms_eval: str | None = None
    api_key: str | None = None
    json: bool = False


def run(options: Options) -> int:
    """Evaluate, and write eval.json, eval.md and eval.png. Returns exit status 0.

    Raises:
        Failed: as `Evaluation` and its `run`.
    """
    Evaluation(options, wide_console(options.json)).run()
    return 0


@dataclass
class Target:
    """A server that is asked."""

    url: str
    model: str
    telemetry: Telemetry | None


class Evaluation:
    """One run of the command.

    Raises:
        Refused: an option cannot be used, or the result file belongs to others.
        LmmsError: lmms-eval is missing.
    """

    def __init__(self, options: Options, console: Console) -> None:
        self.options, self.console, self.out = options, console, options.out
        _check_judge(options.tasks)
        self.tasks = [task_of(name) for name in options.tasks]
        chosen = entries_of(_with_dense(options), [], None) if options.model_path else []
        self.entries = {entry.name: entry for entry in chosen}
        for entry in chosen:
            check_config(entry.config)
        self.program = lmms.find(options.lmms_eval)
        self.version = lmms.version_of(self.program)
        self.kit = self._kit()
        self.needles = self._needles()
        self.file = self.out / "eval.json"
        self.result = self._begin()

    @property
    def names(self) -> list[str]:
        return [*self.entries, *self.options.urls]

    def run(self) -> None:
        """Ask every server, and write eval.json, eval.md and eval.png.

        Raises:
            Failed: a config gave no answers that can be trusted. Those before it are in the file.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if self.version != lmms.VERSION:
            self.console.print(f"lmms-eval is {self.version}; this was tested with {lmms.VERSION}", highlight=False)
        include = list(self.options.include)
        if self.needles is not None:
            include.append(needle_tasks.write(self.needles, self.kit, self.out / "needles"))
        for name in self.names:
            if name in self.result["configs"]:
                self.console.print(f"{name}: in {self.file} already", highlight=False)
                continue
            self.result["configs"][name] = self._measure(name, include)
            write_json(self.file, self.result)
        self._report()

    def _measure(self, name: str, include: Sequence[Path]) -> dict[str, Any]:
        with self._served(name) as (target, served):
            digest = hashlib.sha256(json.dumps(served, sort_keys=True).encode()).hexdigest()[:12]
            cache = self.out / "cache" / f"{name}-{digest}"
            cache.mkdir(parents=True, exist_ok=True)
            answers, prefills = cache / "answers.jsonl", cache / "prefills.jsonl"
            with measured.progress(self.console, name) as heard:
                watch = measured.Watch(answers, prefills, target.telemetry, heard)
                try:
                    scores = lmms.run(
                        self.program,
                        self.tasks,
                        {
                            "base_url": target.url,
                            "local": connections.is_local(target.url),
                            "model": target.model,
                            "timeout": self.options.timeout,
                            "concurrency": self.options.concurrency,
                            "conversation": self.options.conversation,
                            "answers": os.fspath(answers.resolve()),
                        },
                        self.out / "logs" / name,
                        include=include,
                        limit=self.options.limit,
                        api_key=self.options.api_key if name in self.options.urls else None,
                        offline=all(task in NEEDLES.values() for task in self.tasks),
                        waiting=watch.look,
                    )
                except (LmmsError, NoScore) as error:
                    raise LmmsError(f"{name}: {error}") from None
                finally:
                    watch.look()
        return {
            "served": served,
            "figures": measured.figures(answers, prefills, watch.begins_at),
            "scores": {task: asdict(found) for task, found in scores.items()},
        }

    @contextlib.contextmanager
    def _served(self, name: str) -> Iterator[tuple[Target, dict[str, Any]]]:
        """A server, and what decides its answers."""
        # Our videos have the same names whatever is in them.
        asked = {
            "conversation": self.options.conversation,
            "lmms_eval": self.version,
            "needles": self.result["needles"],
        }
        if name in self.options.urls:
            url = self.options.urls[name].rstrip("/").removesuffix("/v1")
            found = target_of(url, self.options.model, 60.0, self.options.api_key)
            target = Target(f"{url}/v1", found.model, found.telemetry)
            yield target, {**asked, **_description(target, self.options.api_key)}
            return
        entry = self.entries[name]
        flags = [*self._flags(), *shlex.split(self.options.server_flags)]
        log = self.out / "logs" / name / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        assert self.options.model_path is not None
        with contextlib.ExitStack() as stack:
            with shown_wait(f"{name}: server starts") as wait:
                server = stack.enter_context(
                    Server(
                        self.options.model_path,
                        *("--attention-backend", "mminfer", "--mminfer-config", entry.config, *flags),
                        log=log,
                        # Configs are compared by what their heads do, not by where they would run dense. With a trace
                        # the server measures times on a GPU, too.
                        env={
                            settings.TRACE.variable: str((log.parent / "trace.jsonl").resolve()),
                            settings.SPARSE.variable: "always",
                        },
                        progress=wait,
                    )
                )
            served = {"model": Path(self.options.model_path).name, "flags": flags, **asked, **_config_of(entry)}
            yield Target(f"{server.url}/v1", server.model, telemetry_of(server.url)), served

    def _flags(self) -> list[str]:
        """Flags of servers that are started: how many frames they see, and the report of what was cached."""
        config: dict[str, Any] = {}
        if self.needles is not None:
            config = json.loads(json.dumps(self.kit.mm_process_config))
        if self.options.frames is not None:
            config.setdefault("video", {})["max_frames"] = self.options.frames
        return ["--enable-cache-report", *(["--mm-process-config", json.dumps(config)] if config else [])]

    def _kit(self) -> Kit:
        if self.options.kit or self.options.model_path is None:
            return KITS[self.options.kit or "cards"]
        return kit_of(None, [self.options.model_path])

    def _needles(self) -> Settings | None:
        aliases = tuple(name for name in self.options.tasks if name in NEEDLES)
        if not aliases:
            return None
        options = self.options
        try:
            return Settings(aliases, options.lengths, options.depths, options.seeds, options.seed)
        except ValueError as error:
            raise Refused(f"--{error}") from None

    def _begin(self) -> dict[str, Any]:
        options = self.options
        question = {
            "model": Path(options.model_path).name if options.model_path else None,
            "tasks": [task.name for task in self.tasks],
            "limit": options.limit,
            "frames": options.frames,
            "conversation": options.conversation,
            "server_flags": options.server_flags,
            "needles": json.loads(json.dumps({"kit": self.kit.name, **asdict(self.needles)})) if self.needles else None,
        }
        if not self.file.exists():
            return {**provenance("eval"), "lmms_eval": self.version, **question, "configs": {}}
        try:
            result: dict[str, Any] = json.loads(self.file.read_text())
            differing = [key for key, value in question.items() if result[key] != value]
            result["configs"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{self.file}: no result of this command ({error}); name another --out") from None
        if differing:
            raise Refused(f"{self.file}: was made with other {', '.join(differing)}; name another --out or remove it")
        return result

    def _report(self) -> None:
        configs = {name: self.result["configs"][name] for name in self.names}
        baseline, found = compared(configs, self.tasks, self.options.margin / 100)
        self.result["compared"] = verdicts.to_json(found, baseline)
        write_json(self.file, self.result)
        rows = table_of(configs, self.tasks)
        page = self.out / "eval.md"
        page.write_text(verdicts.markdown(rows) + verdicts.markdown_section(found, baseline))
        self.console.print(verdicts.rich_table(rows, "Scores, and what they took"))
        verdicts.printed(self.console, found, baseline)
        written = [str(self.file), str(page)]
        if any(found.values()):
            written.append(str(figure.draw(found, baseline, self.out / "eval.png")))
        self.console.print(f"written: {', '.join(written)}", highlight=False)
        if self.options.json:
            print(json.dumps(self.result, indent=1, ensure_ascii=False))


def compared(
    configs: Mapping[str, Any], tasks: Sequence[Task], margin: float
) -> tuple[str, dict[str, list[paired.Comparison]]]:
    """Compare every config with the baseline, by task.

    Raises:
        LmmsError: two configs were not asked the same.
    """
    baseline = verdicts.baseline_of(configs)
    found: dict[str, list[paired.Comparison]] = {}
    for name, config in configs.items():
        if name == baseline:
            continue
        comparisons = []
        for task in tasks:
            dense, other = configs[baseline]["scores"][task.name], config["scores"][task.name]
            try:
                comparisons.append(paired.compare(task.title, dense["score"], other["score"], dense["about"], margin))
            except ValueError as error:
                raise LmmsError(f"{name} beside {baseline}: {error}") from None
        found[name] = paired.corrected(comparisons)
    return baseline, found


def table_of(configs: Mapping[str, Any], tasks: Sequence[Task]) -> list[list[str]]:
    """The table of scores as rows of cells, the heading first."""
    heading = ["config", *(task.title for task in tasks), "density", "prefill ms", "cached share", "questions"]
    rows = [heading]
    for name, config in configs.items():
        scores = [config["scores"][task.name]["score"].values() for task in tasks]
        figures = config["figures"]
        rows.append(
            [
                name,
                *(f"{100 * sum(values) / len(values):.1f} %" for values in scores),
                "–" if figures["density"] is None else f"{figures['density']:.3f}",
                "–" if figures["forward_ms"] is None else f"{figures['forward_ms']:,.0f}",
                "–" if figures["cached_share"] is None else f"{100 * figures['cached_share']:.1f} %",
                f"{sum(map(len, scores)):,}",
            ]
        )
    return rows


def _check_judge(names: Sequence[str]) -> None:
    """Raises Refused for tasks whose answers a language model judges, if none is set for lmms-eval."""
    judged = [name for name in names if task_of(name).judge]
    if judged and not any(os.environ.get(key) for key in JUDGE_KEYS):
        raise Refused(
            f"--tasks: a language model judges the answers of {', '.join(judged)}, and without one lmms-eval counts "
            f"them as wrong; set {' or '.join(JUDGE_KEYS[:2])} for it"
        )


def _with_dense(options: Options) -> list[str]:
    names = list(options.configs or ("default",))
    return names if "dense" in names else ["dense", *names]


def _config_of(entry: Entry) -> dict[str, Any]:
    return {"head_config": json.loads(HeadConfig.load(entry.config).to_json())}


def _description(target: Target, api_key: str | None) -> dict[str, Any]:
    """What decides the answers of a running server, as far as it tells."""
    import httpx

    base = target.url.removesuffix("/v1")
    told: dict[str, Any] = {"model": target.model}
    with contextlib.suppress(httpx.HTTPError, ValueError):
        answer = httpx.get(
            f"{base}/server_info",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=60,
            trust_env=not connections.is_local(base),
        )
        info = answer.json()
        told |= {name: info[name] for name in DECIDING if name in info}
    if target.telemetry is not None:
        with contextlib.suppress(NoTelemetry):
            serving = target.telemetry.server().serving
            told |= {} if serving is None else {"head_config": serving.head_config, "heads": serving.description}
    return told


DECIDING = (
    *("model_path", "revision", "attention_backend", "prefill_attention_backend", "mm_process_config", "dtype"),
    *("quantization", "kv_cache_dtype", "context_length", "chunked_prefill_size", "page_size", "version"),
)
"""Arguments of a server that decide its answers. A server that is started again on another port is the same."""

"""lmms-eval in a process and an environment of its own, and what it left: the scores of single questions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_mminfer.tools.errors import Failed
from sglang_mminfer.tools.evaluation.tasks import Task, score_of

VERSION = "0.7.3"
"""The release of lmms-eval with which the client and the tasks were written and tested."""

PLUGIN = "mminfer_in_lmms"
"""The package that lmms-eval finds our client in."""

KEY = "MMINFER_EVAL_API_KEY"
"""The environment variable that hands the server's API key to the client."""


class LmmsError(Failed):
    """lmms-eval is missing, or gave no result that can be trusted; the message says why."""


@dataclass(frozen=True)
class Scores:
    """The scores of one task, by question: 0 to 1, and what each question is about."""

    score: dict[str, float]
    about: dict[str, str]


def find(named: str | None) -> Path:
    """The program: `named`, or the one on PATH, or that of `make setup-eval` here.

    Raises:
        LmmsError: there is none.
    """
    if named:
        found = shutil.which(named)
        if found is None:
            raise LmmsError(f"--lmms-eval: no program {named}")
        return Path(found)
    here = Path(".venv-eval/bin/lmms-eval")
    on_path = shutil.which("lmms-eval")
    if on_path or here.exists():
        return Path(on_path or here).absolute()
    raise LmmsError(
        f"lmms-eval is not installed: run `make setup-eval` in a checkout, or `uv tool install lmms-eval=={VERSION} "
        '--with "filelock<4"`, or name the program with --lmms-eval'
    )


def version_of(program: Path) -> str:
    """The version of lmms-eval, from the packages beside its program; "unknown" if it cannot be read."""
    python = program.resolve().parent / "python"
    code = "import importlib.metadata as m; print(m.version('lmms-eval'))"
    done = subprocess.run([python if python.exists() else "python3", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def install_client(folder: Path) -> Path:
    """Write the package with our client for lmms-eval to `folder`, which has to be in PYTHONPATH then."""
    from sglang_mminfer.tools.evaluation import in_lmms

    home = folder / PLUGIN
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(Path(in_lmms.__file__).parent, home, ignore=shutil.ignore_patterns("__pycache__"))
    info = folder / f"{PLUGIN}-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\nmminfer = {PLUGIN}.client:manifest\n")
    return folder


def run(
    program: Path,
    tasks: Sequence[Task],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    include: Sequence[Path] = (),
    limit: int | None = None,
    api_key: str | None = None,
    offline: bool = False,
    waiting: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Ask one server all questions of some tasks.

    Args:
        settings: of the client; see `in_lmms.client.Client`.
        folder: for the log and the results; results of an earlier run are removed.
        include: folders with tasks. limit: questions of each task.
        offline: whether the tasks need nothing of the Hub.
        waiting: called about twice a second while lmms-eval runs.

    Returns:
        The scores by the tasks' names.

    Raises:
        LmmsError: lmms-eval crashed, a request failed, or questions have no score.
    """
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    answers = Path(settings["answers"])
    begins_at = answers.stat().st_size if answers.exists() else 0
    file = folder / "client.json"
    file.write_text(json.dumps(dict(settings), indent=1))
    command = [os.fspath(program), "eval", "--model", "mminfer", "--model_args", f"settings={file.resolve()}"]
    command += ["--tasks", ",".join(task.name for task in tasks), "--batch_size", "1", "--log_samples"]
    command += ["--output_path", os.fspath(results.resolve())]
    command += [word for path in include for word in ("--include_path", os.fspath(path.resolve()))]
    command += ["--limit", str(limit)] if limit else []
    environment = {**os.environ, "PYTHONPATH": os.fspath(install_client(folder / "client").resolve())}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {}
    environment |= {KEY: api_key} if api_key else {}
    log = folder / "lmms-eval.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                waiting()
        finally:  # Ctrl-C as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    _no_failures(answers, begins_at)
    return {task.name: _scores(task, results, answers, log) for task in tasks}


def answers_in(file: Path, begins_at: int = 0) -> list[dict[str, Any]]:
    """What the client wrote, from a place in its file on. A line that was cut off when a process died is left out."""
    found = []
    if file.exists():
        with file.open("rb") as lines:
            lines.seek(begins_at)
            for line in lines:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return found


def _no_failures(answers: Path, begins_at: int) -> None:
    failed = [entry for entry in answers_in(answers, begins_at) if entry.get("error")]
    if failed:
        first = failed[0]
        raise LmmsError(
            f"{len(failed)} requests failed; none of them counts as a wrong answer, and the same command asks them "
            f"again. The first: {first['task']}, question {first['doc_id']}: {first['error']}"
        )


def _scores(task: Task, results: Path, answers: Path, log: Path) -> Scores:
    """Raises LmmsError: no sample, or fewer than requests, which is how a crash shows: lmms-eval exits with 0."""
    samples = [
        json.loads(line)
        for path in results.rglob(f"*_samples_{task.name}.jsonl")
        for line in path.read_text().splitlines()
    ]
    if not samples or not list(results.rglob("*_results.json")):
        raise LmmsError(f"lmms-eval gave no results for {task.name}; {log} ends with:\n{_tail(log)}")
    about = {
        str(entry["doc_id"]): entry["about"]
        for entry in answers_in(answers)
        if entry.get("task") == task.name and "doc_id" in entry
    }
    scores = {str(sample["doc_id"]): score_of(sample, task) for sample in samples}
    if unasked := scores.keys() - about.keys():
        raise LmmsError(f"{task.name}: {len(unasked)} questions have a score, but no request; see {log}")
    return Scores(scores, {key: about[key] for key in scores})


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-lines:])

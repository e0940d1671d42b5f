"""Every flag and environment variable of this package: its default, its meaning, and since when it is there.

`SETTINGS` is the list, for people too: docs/settings.md is made of it (`python -m sglang_mminfer.settings`). Nobody
else reads a variable whose name begins with SGLANG_MMINFER. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BACKEND_NAME = "mminfer"

PREFIX = "SGLANG_MMINFER_"
"""With which the name of every variable of ours begins."""

TESTED_SGLANG = ">=0.5.23,<0.5.24"
"""The versions of SGLang that the tests were run with, as in pyproject.toml."""


@dataclass(frozen=True)
class Setting:
    """One thing that a user may say.

    Attributes:
        variable: its environment variable.
        flag: the server's flag for it, which wins over the variable; "" where there is none.
        default: what holds if nobody says it, as one would type it.
        meaning: what it does, and what it may be.
        since: the version of this package that brought it.
        internal: set by our own commands for the servers that they start, and by nobody else.
    """

    variable: str
    default: str
    meaning: str
    flag: str = ""
    since: str = "0.1.0"
    internal: bool = False

    def read(self, environ: Mapping[str, str] | None = None) -> str:
        """What the environment says, "" where it says nothing."""
        return (os.environ if environ is None else environ).get(self.variable, "")


CONFIG = Setting(
    "SGLANG_MMINFER_CONFIG",
    "default",
    "What every head does: the name of a built-in head config (`default`, `dense`, `baseline_*`) or the path of a JSON "
    'file. `--json-model-override-args \'{"mminfer_config": "..."}\'` says it, too, behind flag and variable.',
    flag="--mminfer-config",
)
AUDIT = Setting(
    "SGLANG_MMINFER_AUDIT",
    "0",
    "The share of requests, 0 to 1, of which sampled rows are computed again densely; error and recall of every sparse "
    "layer go to trace and metrics. Answers stay the same.",
    flag="--mminfer-audit",
)
EXECUTOR = Setting(
    "SGLANG_MMINFER_EXECUTOR",
    "auto",
    "Which kernel runs the plans: `auto` (`triton` on a GPU, `torch` elsewhere), `torch`, `triton`, or `flashinfer` "
    "(the same plans on FlashInfer's kernels, for where Triton is not to be used).",
)
DENSE_HEADS = Setting(
    "SGLANG_MMINFER_DENSE_HEADS",
    "auto",
    "Where dense heads beside sparse ones run: `stock` (SGLang's backend), `own` (this package's executor), or `auto`: "
    "on a GPU stock where that is cheap, elsewhere own.",
)
PLAN_BUDGET_MS = Setting(
    "SGLANG_MMINFER_PLAN_BUDGET_MS",
    "200",
    "Milliseconds that planning one head pattern of a chunk of 8,192 rows may cost, by estimate; beyond it the chunk "
    "is dense and counted as `plan_budget`. `inf`: no limit.",
)
PLAN_BUDGET_MB = Setting("SGLANG_MMINFER_PLAN_BUDGET_MB", "256", "The same in megabytes.")
MENDS = Setting(
    "SGLANG_MMINFER_MENDS",
    "all",
    "Which faults of SGLang's media handling are mended (mends.md): `all`, `none`, `-name,-other` for all but these, "
    "`name,other` for these only.",
)
MAX_MEGAPIXELS = Setting(
    "SGLANG_MMINFER_MAX_MEGAPIXELS",
    "100",
    "How large a picture or a frame may be before it is decoded; at most 178. A larger one is the client's error.",
)
TRACE = Setting(
    "SGLANG_MMINFER_TRACE",
    "",
    "A file to which one JSON line is appended for each prefill batch and request. Further ranks and data-parallel "
    "groups write FILE.rank1, FILE.dp1 and so on.",
)
OBSERVERS = Setting(
    "SGLANG_MMINFER_OBSERVERS",
    "",
    "Observers of attention layers as `module:function=value`, one a line; the function makes an observer of the value "
    "and a RankInfo. `mminfer inspect` and `mminfer search` work through it.",
    internal=True,
)
SPLIT_VIDEOS = Setting(
    "SGLANG_MMINFER_SPLIT_VIDEOS",
    "",
    "The switch of the first five mends before SGLANG_MMINFER_MENDS: 0 leaves them out, 1 mends the media of every "
    "server. Understood for one more release.",
)

SETTINGS: tuple[Setting, ...] = (
    CONFIG,
    AUDIT,
    EXECUTOR,
    DENSE_HEADS,
    PLAN_BUDGET_MS,
    PLAN_BUDGET_MB,
    MENDS,
    MAX_MEGAPIXELS,
    TRACE,
    OBSERVERS,
    SPLIT_VIDEOS,
)

EXECUTOR_CHOICES = ("auto", "torch", "triton", "flashinfer")
DENSE_HEADS_CHOICES = ("auto", "stock", "own")
MOST_MEGAPIXELS = 178
"""More than this PIL itself refuses to open."""

MODEL_KEY = "mminfer_config"
"""In a model's config: where --json-model-override-args puts the name of a head config."""


def executor() -> str:
    """The executor that the environment names for sparse layers, else "auto"."""
    return EXECUTOR.read() or EXECUTOR.default


def dense_heads() -> str:
    """Where dense heads beside sparse ones are to run: one of DENSE_HEADS_CHOICES, if the setting is right."""
    return DENSE_HEADS.read() or DENSE_HEADS.default


def dense_heads_on_stock(device: str) -> Literal["never", "cheap", "always"]:
    """Whether dense heads beside sparse ones go to the stock backend: on a GPU where it is cheap, if nobody says.

    On a CPU stock `torch_native` computes rows of a cached prefix again, and our executor does not.
    """
    choice = dense_heads()
    if choice == "auto":
        return "never" if str(device).split(":")[0] == "cpu" else "cheap"
    return "always" if choice == "stock" else "never"


def share_of_requests(text: str) -> float:
    """argparse type of the audit flag.

    Raises:
        argparse.ArgumentTypeError: if it is no number from 0 to 1.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:  # NaN is refused too
        raise argparse.ArgumentTypeError(f"expected a share of requests from 0 to 1, got {text!r}")
    return rate


def audit_rate(environ: Mapping[str, str] | None = None) -> float:
    """The share of requests to audit, by the environment.

    Raises:
        argparse.ArgumentTypeError: if it names no share.
    """
    return share_of_requests(AUDIT.read(environ) or AUDIT.default)


def plan_budget(environ: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Milliseconds and megabytes that planning one head pattern of a chunk may cost.

    Raises:
        ValueError: naming the variable that holds no number above 0.
    """
    milliseconds, megabytes = (_positive(setting, environ) for setting in (PLAN_BUDGET_MS, PLAN_BUDGET_MB))
    return milliseconds, megabytes


def max_megapixels(environ: Mapping[str, str] | None = None) -> float:
    """How large a picture or a frame may be.

    Raises:
        ValueError: naming the variable that holds no number above 0.
    """
    return min(_positive(MAX_MEGAPIXELS, environ), MOST_MEGAPIXELS)


def _positive(setting: Setting, environ: Mapping[str, str] | None) -> float:
    text = setting.read(environ) or setting.default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"{setting.variable}: expected a number above 0 (inf: no limit), got {text!r}")
    return value


def is_bad(read: Any) -> bool:
    """True if the environment says what one of the functions here cannot read."""
    try:
        read()
    except (ValueError, argparse.ArgumentTypeError):
        return True
    return False


def sglang_is_within(versions: str) -> bool:
    """Whether the SGLang that is installed fits a version specifier."""
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version("sglang"), prereleases=True)


def why_untested() -> str | None:
    """A sentence if the SGLang that is installed is not one that the tests were run with."""
    from importlib.metadata import version

    if sglang_is_within(TESTED_SGLANG):
        return None
    return f"untested with SGLang {version('sglang')}; the tests were run with {TESTED_SGLANG}."


def page() -> str:
    """The list as a page of the documents."""
    lines = [
        "# Settings",
        "",
        "A flag of the server wins over its variable. `sglang serve --help` does not show these flags, because SGLang",
        "prints its help before it loads plugins; this page and `mminfer doctor` list them. It is made by",
        "`python -m sglang_mminfer.settings`.",
        "",
        "The backend itself is SGLang's own flag: `--attention-backend mminfer`, or, beside a decode backend of your",
        "own, `--prefill-attention-backend mminfer`.",
        "",
        "| flag | variable | default | since | |",
        "|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        flag = f"`{setting.flag}`" if setting.flag else ""
        default = f"`{setting.default}`" if setting.default else "none"
        meaning = setting.meaning.replace("|", "\\|") + (" Set by our commands." if setting.internal else "")
        lines.append(f"| {flag} | `{setting.variable}` | {default} | {setting.since} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")

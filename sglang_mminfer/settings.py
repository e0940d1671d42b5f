"""Every flag and environment variable of this package: its default, its meaning, and the version that brought it.

`SETTINGS` lists them, and docs/settings.md is made from the list (`python -m sglang_mminfer.settings`). No other module
reads a variable whose name begins with SGLANG_MMINFER. This module imports the standard library only.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BACKEND_NAME = "mminfer"

HUB_SCHEME = "hf://"
HUB_NAME = r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<path>[\w./ -]+\.json)"
"""How a head config on the Hugging Face Hub is named, and what such a name looks like, as a regular expression."""

PREFIX = "SGLANG_MMINFER_"
"""With which the name of every variable of ours begins."""

TESTED_SGLANG = ">=0.5.20,<0.5.24"
"""The versions of SGLang that the tests were run with; the same specifier as in pyproject.toml."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        variable: the environment variable.
        flag: the server's flag, which wins over the variable; "" if there is none.
        default: the value if neither is set, as one would type it.
        meaning: what the setting does, and its values.
        since: the version of this package that brought it.
        internal: only our own commands set it, for the servers that they start.
    """

    variable: str
    default: str
    meaning: str
    flag: str = ""
    since: str = "0.1.0"
    internal: bool = False

    def read(self, environ: Mapping[str, str] | None = None) -> str:
        """The variable's value, "" if it is not set.

        Args:
            environ: the environment; None for that of this process.
        """
        return (os.environ if environ is None else environ).get(self.variable, "")


CONFIG = Setting(
    "SGLANG_MMINFER_CONFIG",
    "default",
    "What every head does: the name of a built-in head config (`default`, `dense`, `grid_static`, `baseline_*`) or the "
    "path of a JSON file, here or on the Hugging Face Hub (`hf://owner/repo[@revision]/path/file.json`). "
    '`--json-model-override-args \'{"mminfer_config": "..."}\'` names one, too; flag and variable '
    "win over it.",
    flag="--mminfer-config",
)
AUDIT = Setting(
    "SGLANG_MMINFER_AUDIT",
    "0",
    "The share of requests, 0 to 1, whose sampled query rows are computed again densely; error and recall of every "
    "sparse layer go to trace and metrics. Answers stay the same.",
    flag="--mminfer-audit",
)
GUARD = Setting(
    "SGLANG_MMINFER_GUARD",
    "0",
    "The largest output error, above 0 to 1, that a head may have in audited requests: one that exceeds it in three of "
    "them in a row runs dense for later requests (auditing.md). 0: no guard. Without a share of requests to audit, it "
    "is 0.05.",
    flag="--mminfer-guard",
)
BASIS = Setting(
    "SGLANG_MMINFER_BASIS",
    "clip",
    "Where the basis comes from by which `adaptive` heads choose keys, if none lies beside the head config: `clip` (a "
    "built-in conversation that a server computes densely at its start and keeps on disk for later starts), `none` (by "
    "q . k itself, which is exact and slower), or the path of a file that `mminfer basis` wrote. `none` and a file "
    "count even if one lies beside the config.",
)
EXECUTOR = Setting(
    "SGLANG_MMINFER_EXECUTOR",
    "auto",
    "Which kernel runs the plans: `auto` (on a GPU `fa4` if it can, else `triton`; `torch` elsewhere), `torch`, `fa4` "
    "(flash-attn-4's kernels, on Hopper and Blackwell), `triton`, or `flashinfer` (the same plans on FlashInfer's "
    "kernels, if neither must be used).",
)
SPARSE = Setting(
    "SGLANG_MMINFER_SPARSE",
    "faster",
    "When a chunk that can run sparse does: `faster` (if that is estimated to take less time than dense attention; "
    "others are counted as `not_faster`), or `always`.",
)
DENSE_HEADS = Setting(
    "SGLANG_MMINFER_DENSE_HEADS",
    "auto",
    "Where the dense heads of a layer with sparse heads run: `stock` (SGLang's backend), `own` (this package's "
    "executor), or `auto` (`stock` on a GPU if that is cheap, else `own`).",
)
PLAN_BUDGET_MS = Setting(
    "SGLANG_MMINFER_PLAN_BUDGET_MS",
    "200",
    "Milliseconds that planning one head pattern of a chunk of 8,192 rows may take, by estimate. A chunk above it runs "
    "dense and is counted as `plan_budget`. `inf`: no limit.",
)
PLAN_BUDGET_MB = Setting(
    "SGLANG_MMINFER_PLAN_BUDGET_MB", "256", "Megabytes that the same planning may take, by estimate. `inf`: no limit."
)
MENDS = Setting(
    "SGLANG_MMINFER_MENDS",
    "all",
    "Which faults of SGLang's media handling are mended (mends.md): `all`, `none`, `-name,-other` for all but these, "
    "`name,other` for these only.",
)
MAX_MEGAPIXELS = Setting(
    "SGLANG_MMINFER_MAX_MEGAPIXELS",
    "100",
    "The most megapixels of a picture or a frame, checked before it is decoded; at most 178. A larger one is the "
    "client's error.",
)
MEDIA_ROOT = Setting(
    "SGLANG_MMINFER_MEDIA_ROOT",
    "",
    "The only directory from which clients may name local files as media, by path or `file://`; symbolic links and "
    "`..` count as where they lead. URLs and `data:` are not affected. Without it a client may name any file that the "
    "server's user can read.",
    flag="--mminfer-media-root",
)
MEDIA_CACHE_MB = Setting(
    "SGLANG_MMINFER_MEDIA_CACHE_MB",
    "1024",
    "Megabytes of decoded and preprocessed videos that the server keeps in memory, so that later turns do not decode "
    "them again (operating.md#what-later-turns-do-with-earlier-videos). 0: none.",
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
    "Observers of attention layers, one `module:function=value` on each line; the function makes an observer from the "
    "value and a RankInfo. `mminfer inspect` and `mminfer search` work through it.",
    internal=True,
)
SPLIT_VIDEOS = Setting(
    "SGLANG_MMINFER_SPLIT_VIDEOS",
    "",
    "The older switch of the first five mends: `0` switches them off, `1` mends the media of every server, with and "
    "without mminfer. It works for one more release.",
)

SETTINGS: tuple[Setting, ...] = (
    CONFIG,
    AUDIT,
    GUARD,
    BASIS,
    EXECUTOR,
    SPARSE,
    DENSE_HEADS,
    PLAN_BUDGET_MS,
    PLAN_BUDGET_MB,
    MENDS,
    MAX_MEGAPIXELS,
    MEDIA_ROOT,
    MEDIA_CACHE_MB,
    TRACE,
    OBSERVERS,
    SPLIT_VIDEOS,
)

GUARD_AUDIT_RATE = 0.05
"""The share of requests that is audited for the guard where nobody named one."""

EXECUTOR_CHOICES = ("auto", "torch", "fa4", "triton", "flashinfer")
SPARSE_CHOICES = ("faster", "always")
DENSE_HEADS_CHOICES = ("auto", "stock", "own")
MOST_MEGAPIXELS = 178
"""PIL refuses to open larger pictures."""

MODEL_KEY = "mminfer_config"
"""Key in a model's config under which --json-model-override-args puts the name of a head config."""


def basis() -> str:
    """Where the basis of the heads comes from: what the variable names, else "clip". Not checked."""
    return BASIS.read() or BASIS.default


def executor() -> str:
    """The executor for sparse layers: what the variable names, else "auto". Not checked against EXECUTOR_CHOICES."""
    return EXECUTOR.read() or EXECUTOR.default


def sparse() -> str:
    """When a chunk that can run sparse does: what the variable names, else "faster". Not checked."""
    return SPARSE.read() or SPARSE.default


def dense_heads() -> str:
    """Where dense heads beside sparse ones run: what the variable names, else "auto". Not checked."""
    return DENSE_HEADS.read() or DENSE_HEADS.default


def dense_heads_on_stock(device: str) -> Literal["never", "cheap", "always"]:
    """When dense heads beside sparse ones run on the stock backend. "cheap": if few heads have to run twice for it.

    The default on a CPU is "never": there the stock backend, `torch_native`, computes the rows of a cached prefix
    again, and our executor does not.
    """
    choice = dense_heads()
    if choice == "auto":
        return "never" if str(device).split(":")[0] == "cpu" else "cheap"
    return "always" if choice == "stock" else "never"


def share_of_requests(text: str) -> float:
    """The argparse type of the audit flag: a number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    return _up_to_1(text, "a share of requests from 0 to 1")


def audit_rate(environ: Mapping[str, str] | None = None) -> float | None:
    """The share of requests to audit that the environment names; None if it names none.

    Raises:
        argparse.ArgumentTypeError: if it is no number from 0 to 1.
    """
    text = AUDIT.read(environ)
    return share_of_requests(text) if text else None


def output_error(text: str) -> float:
    """The argparse type of the guard flag: a number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    return _up_to_1(text, "a relative output error from 0 (no guard) to 1")


def _up_to_1(text: str, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:  # NaN is refused too
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def guard_error(environ: Mapping[str, str] | None = None) -> float:
    """The largest output error of a head that the environment names; 0: no guard.

    Raises:
        argparse.ArgumentTypeError: if it is no number from 0 to 1.
    """
    return output_error(GUARD.read(environ) or GUARD.default)


def plan_budget(environ: Mapping[str, str] | None = None) -> tuple[float, float]:
    """(milliseconds, megabytes) that planning one head pattern of a chunk may take.

    Raises:
        ValueError: naming the variable that holds no number above 0.
    """
    milliseconds, megabytes = (_positive(setting, environ) for setting in (PLAN_BUDGET_MS, PLAN_BUDGET_MB))
    return milliseconds, megabytes


def max_megapixels(environ: Mapping[str, str] | None = None) -> float:
    """The most megapixels that a picture or a frame may have.

    Raises:
        ValueError: if the variable holds no number above 0.
    """
    return min(_positive(MAX_MEGAPIXELS, environ), MOST_MEGAPIXELS)


def media_cache_bytes(environ: Mapping[str, str] | None = None) -> int:
    """Bytes of decoded and preprocessed videos that a server keeps; 0: it keeps none.

    Raises:
        ValueError: if the variable holds no number from 0 on, or infinity.
    """
    text = MEDIA_CACHE_MB.read(environ) or MEDIA_CACHE_MB.default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{MEDIA_CACHE_MB.variable}: expected megabytes, a number from 0 (none) on, got {text!r}")
    return int(value * 2**20)


def _positive(setting: Setting, environ: Mapping[str, str] | None) -> float:
    text = setting.read(environ) or setting.default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"{setting.variable}: expected a number above 0 (inf: no limit), got {text!r}")
    return value


def directory(path: str) -> str:
    """The argparse type of the media root: the absolute path of a directory that exists, with no symbolic link in it.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"expected a directory that exists, got {path!r}")
    return os.path.realpath(path)


def media_root(environ: Mapping[str, str] | None = None) -> str | None:
    """The directory of local media that the environment names, as `directory` gives it; None if it names none.

    Raises:
        argparse.ArgumentTypeError: if there is no such directory.
    """
    path = MEDIA_ROOT.read(environ)
    return directory(path) if path else None


def is_bad(read: Any) -> bool:
    """Whether `read`, one of the functions above, cannot read what the environment holds."""
    try:
        read()
    except (ValueError, argparse.ArgumentTypeError):
        return True
    return False


def sglang_is_within(versions: str) -> bool:
    """Whether the installed SGLang matches a version specifier."""
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version("sglang"), prereleases=True)


def why_untested() -> str | None:
    """A sentence if the installed SGLang is no version that the tests were run with, else None."""
    from importlib.metadata import version

    if sglang_is_within(TESTED_SGLANG):
        return None
    return f"untested with SGLang {version('sglang')}; the tests were run with {TESTED_SGLANG}."


def page() -> str:
    """The text of docs/settings.md."""
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

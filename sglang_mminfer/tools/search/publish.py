"""`mminfer search --push-to-hub`: a searched config on the Hugging Face Hub, with its report and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from sglang_mminfer import settings
from sglang_mminfer.head_config.basis_file import ENDING
from sglang_mminfer.tools.errors import Refused
from sglang_mminfer.tools.search.report import rows_of

if TYPE_CHECKING:
    from sglang_mminfer.tools.search.run import SearchResult

LIBRARY = "sglang-mminfer"


def check_login(repo: str) -> None:
    """Ask the hub who we are, before an hour of searching.

    Raises:
        Refused: nobody is logged in, or the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi

    try:
        HfApi(library_name=LIBRARY).whoami()
    except (OSError, ValueError, httpx.HTTPError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"--push-to-hub {repo}: the hub does not know us: {why}. `hf auth login`, or HF_TOKEN") from None


def push(result: SearchResult, config: Path, report: Path, repo: str) -> str:
    """Upload config, basis, report and card in one commit; the repository is made if there is none.

    Args:
        result: what the card tells.
        config: the config's file; its basis, if it has one, lies beside it.
        report: the report's page.
        repo: `owner/name`.

    Returns:
        The name by which a server takes the config, with the commit.

    Raises:
        SearchError: the hub refused. The files stay where they are.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    from sglang_mminfer.tools.search.run import SearchError

    files = [config, report, *([basis] if (basis := config.with_name(config.stem + ENDING)).is_file() else [])]
    api = HfApi(library_name=LIBRARY)
    try:
        api.create_repo(repo, exist_ok=True)
        contents = [(file.name, file.read_bytes()) for file in files]
        commit = api.create_commit(
            repo,
            [
                CommitOperationAdd(name, content)
                for name, content in [*contents, ("README.md", card(result, config.name, report.name, repo).encode())]
            ],
            commit_message=f"Head config {result.config.name}",
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise SearchError(f"--push-to-hub {repo}: {error}. The files are here: {config}, {report}") from None
    return f"{settings.HUB_SCHEME}{repo}@{commit.oid}/{config.name}"


def card(result: SearchResult, config: str, report: str, repo: str) -> str:
    """The repository's page, in Markdown: how to launch, where the config comes from, what it was measured to do."""
    from huggingface_hub import ModelCardData

    how = result.config.provenance
    model = result.config.model
    fields = {} if model is None else msgspec.to_builtins(model)
    tags = [LIBRARY, "head-config", "sparse-attention", *(f"mminfer:{name}={value}" for name, value in fields.items())]
    data = ModelCardData(library_name=LIBRARY, tags=tags)
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# Head config {result.config.name}\n",
        f"What every attention head of {fields.get('architecture', 'a model')} does in sparse prefill of images and "
        "videos, for the SGLang plugin `sglang-mminfer`:\n",
        f"    sglang serve --model-path MODEL --attention-backend mminfer --mminfer-config hf://{repo}/{config}\n",
        "## Provenance\n",
        f"{how.note}\n",
        *_table(["", ""], [[key, value] for key, value in _provenance(result).items()]),
        "## The model that it fits\n",
        *_table(["field", "value"], [[f"`{name}`", value] for name, value in fields.items()]),
    ]
    for title, scores in (("On the calibration input", result.calibration), ("On the held-out input", result.held_out)):
        if scores is not None:
            rows = [[name, f"{share:.1%}", f"{error:.4f}", f"{ms:,.0f}"] for name, share, error, ms in rows_of(scores)]
            lines += [f"## {title}\n", *_table(["config", "density", "error", "ms"], rows)]
    lines += [f"{result.cost_words} The pictures are in [the report]({report}).\n"]
    lines += [f"* Mind: {doubt}" for doubt in result.doubts]
    return "\n".join(lines) + "\n"


def _provenance(result: SearchResult) -> dict[str, str]:
    how = result.config.provenance
    entries = {"calibration": how.calibration, "budget": how.budget, "date": how.date}
    details = {key: json.dumps(value, ensure_ascii=False) for key, value in (how.details or {}).items()}
    return {key: value for key, value in {**entries, **details}.items() if value}


def _table(heading: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table. A bar in a cell would end the cell."""
    cells = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]

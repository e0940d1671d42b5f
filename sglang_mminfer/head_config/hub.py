"""Head configs on the Hugging Face Hub: `hf://owner/repo[@revision]/path/file.json`.

`huggingface_hub` downloads and caches: with HF_HUB_OFFLINE=1 the cache alone is asked, HF_TOKEN opens private
repositories, HF_ENDPOINT names another hub. What comes from there is decoded as strictly as a local file, and nothing
in it is executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sglang_mminfer import settings
from sglang_mminfer.head_config.basis_file import ENDING
from sglang_mminfer.head_config.fingerprint import HeadConfigError


@dataclass(frozen=True)
class Downloaded:
    """A config's file in the cache, and the basis beside it in the same commit, if there is one.

    name: the config's, with the commit in place of a branch: `hf://owner/repo@commit/path/file.json`.
    """

    name: str
    config: Path
    basis: Path | None


def is_hub_name(name: str) -> bool:
    """Whether a config is named by its place on the hub."""
    return name.startswith(settings.HUB_SCHEME)


def download(name: str) -> Downloaded:
    """The files of a config, from the cache or the hub.

    Args:
        name: `hf://owner/repo[@revision]/path/file.json`; a revision is a branch, a tag or a commit, by default `main`.

    Raises:
        HeadConfigError: the name is none, or there is no such repository, revision or file, or the hub cannot be
            reached and the cache does not have it.
    """
    match = re.fullmatch(settings.HUB_NAME, name)
    if match is None or ".." in name.split("/"):
        raise HeadConfigError(f'head config "{name}": expected hf://owner/repo[@revision]/path/file.json')
    repo, revision, path = match["repo"], match["revision"], match["path"]
    config = _file(name, repo, revision, path)
    commit = _commit(config, path)
    beside = path.removesuffix(".json") + ENDING
    try:
        basis: Path | None = _file(name, repo, commit, beside)
    except _Absent:
        basis = None
    return Downloaded(f"{settings.HUB_SCHEME}{repo}@{commit}/{path}", config, basis)


class _Absent(HeadConfigError):
    """The repository has no such file, as far as can be told."""


def _file(name: str, repo: str, revision: str | None, path: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, path, revision=revision, library_name="sglang-mminfer"))
    except errors.GatedRepoError:
        why = "access to the repository must be granted first; HF_TOKEN says who asks"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such repository, or HF_TOKEN may not read it"
    except errors.RevisionNotFoundError:
        why = f"the repository has no revision {revision or 'main'}"
    except errors.LocalEntryNotFoundError:
        raise _Absent(f'head config "{name}": not in the cache, and the hub cannot be reached or asked') from None
    except errors.EntryNotFoundError:
        raise _Absent(f'head config "{name}": the repository has no file {path}') from None
    except (OSError, ValueError, errors.HTTPError) as error:  # a bad name, a full disk, an answer that is no hub's
        why = str(error).splitlines()[0]
    raise HeadConfigError(f'head config "{name}": {why}')


def _commit(file: Path, path: str) -> str:
    """The commit of a file in the cache: `.../snapshots/COMMIT/path`."""
    return file.parts[-len(path.split("/")) - 1]

"""Tests of what SGLang has since a release: `make test-sglang` runs them with older ones, too."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def is_before(release: str) -> bool:
    """Whether the installed SGLang is older than a release."""
    return Version(version("sglang")) < Version(release)


def skip_before(release: str) -> None:
    """Skip a test if the installed SGLang is older than a release."""
    if is_before(release):
        pytest.skip(f"of SGLang {release} and later")

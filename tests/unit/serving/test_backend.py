"""The attention backends of one model runner, where SGLang makes several."""

from __future__ import annotations

import pytest

import observed
from sglang_mminfer.serving.backend import create_backend


def test_backends_of_adaptive_speculation_share_what_they_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes one for each number of drafts and takes turns with them. It makes several for two-batch overlap,
    too, whose batches run at once."""
    monkeypatch.setattr("sglang_mminfer.serving.head_config_choice.announce_once", lambda runner: None)
    runner = observed.runner("test_a_shape", monkeypatch)
    first, overlapped = create_backend(runner), create_backend(runner)
    assert first.mminfer is not overlapped.mminfer
    runner.init_new_workspace = True
    adaptive = create_backend(runner)
    assert adaptive is not overlapped and adaptive.mminfer is overlapped.mminfer
    other = observed.runner("test_a_shape", monkeypatch)
    other.init_new_workspace = True
    assert create_backend(other).mminfer is not adaptive.mminfer


def test_a_draft_model_has_the_dense_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = observed.runner("test_a_shape", monkeypatch)
    runner.is_draft_worker = True
    assert not hasattr(create_backend(runner), "mminfer")

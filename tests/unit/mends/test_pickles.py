"""Modalities pass SGLang's unpickler whatever Python pickles them."""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections.abc import Iterator

import pytest
from sglang.srt.disaggregation.encoder.receiver import EmbeddingData
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.utils.common import safe_pickle_load

from sglang_mminfer import settings
from sglang_mminfer.mends import asked, pickles
from sglang_versions import skip_before


@pytest.fixture
def python_3_11_2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Members of enums are pickled as there; what a mend adds ends with the test."""
    monkeypatch.setattr(Modality, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    before = dict(copyreg.dispatch_table)
    asked.note(None)  # nobody has asked yet, whatever another test left
    yield
    asked.note(None)
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


def sent(data: EmbeddingData) -> EmbeddingData:
    return safe_pickle_load(io.BytesIO(pickle.dumps(data)))


@pytest.mark.usefixtures("python_3_11_2")
def test_the_language_server_reads_what_its_encoder_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_before("0.5.21")  # whose unpickler takes all of builtins
    data = EmbeddingData("a", 1, 0, [[1, 2, 2]], Modality.VIDEO)
    copyreg.dispatch_table.pop(Modality, None)  # hooks that another test left may have mended it
    with pytest.raises(RuntimeError, match="Blocked unsafe global"):
        sent(data)
    pickles.modality_by_value(None, data)
    with pytest.raises(RuntimeError, match="Blocked unsafe global"):
        sent(data)  # an encoder without mminfer is left as it is
    asked.note(types.SimpleNamespace(attention_backend=settings.BACKEND_NAME))
    monkeypatch.setenv(settings.MENDS.variable, "none")
    pickles.modality_by_value(None, data)
    with pytest.raises(RuntimeError, match="Blocked unsafe global"):
        sent(data)
    monkeypatch.delenv(settings.MENDS.variable)
    pickles.modality_by_value(None, data)
    assert sent(data).modality is Modality.VIDEO

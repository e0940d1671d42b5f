"""SGLang's class of MiniCPM-V, mended."""

from __future__ import annotations

import functools
from typing import Any

_MODULE = "sglang.srt.models.minicpmv"


def is_mended(kind: type) -> bool:
    """Whether `kind` is SGLang's class around a MiniCPM-V of some version."""
    return kind.__module__ == _MODULE


@functools.cache
def handing_over_fields(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class HandsOverFields(base):
        """SGLang's class holds the model of one version, and its `eval` returns that model. SGLang's loader has written
        into the holder what its runner then reads from the model."""

        def eval(self) -> Any:
            model = self.minicpmv.eval()
            model.shared_experts_config = self.shared_experts_config
            return model

    HandsOverFields.__name__ = HandsOverFields.__qualname__ = base.__name__  # SGLang asks for it by name
    return HandsOverFields

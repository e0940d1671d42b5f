"""What SGLang's processes send each other as pickles, in a form that its own unpickler takes.

Python 3.11.0 to 3.11.3 pickles a member of an enum as a call of `getattr`, which SGLang's unpickler blocks.
"""

from __future__ import annotations

import copyreg
from enum import Enum
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import asked


def modality_by_value(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER EmbeddingData.__init__: the encoder's data holds a modality. From now on an encoder started with mminfer
    pickles all of them by value, as other Pythons do."""
    if isinstance(self.modality, Enum) and asked.for_mminfer() and mends.active("modality_pickle"):
        copyreg.pickle(type(self.modality), _by_value)


def _by_value(member: Enum) -> tuple[type[Enum], tuple[Any]]:
    return type(member), (member.value,)

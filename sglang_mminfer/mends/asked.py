"""Whether this process works for a server with mminfer, so that hooks on SGLang's model code leave other servers alone.

SGLang's model code makes a config, a processor or a class without knowing the server's arguments. Every process of a
server resolves or publishes its arguments before that, and both go through ServerArgs.resolve_once. The last arguments
count, as the last published ones do in SGLang's own runtime context.

This module imports nothing of SGLang.
"""

from __future__ import annotations

import sys
from typing import Any

from sglang_mminfer import mends

_last: Any = None


def note(server_args: Any) -> None:
    """Remember the arguments that this process is about to resolve or publish. `serving.hooks.note` calls this."""
    global _last
    before, _last = for_mminfer(), server_args
    if for_mminfer() != before and (known := sys.modules.get("sglang.srt.utils.hf_transformers.config")):
        known.get_config.cache_clear()  # another server of this process may have read a config differently


def server_args() -> Any:
    """The ServerArgs that this process resolved or published last; None before."""
    return _last


def for_mminfer() -> bool:
    """True if the arguments of this process name mminfer as their attention backend."""
    return _last is not None and mends.wanted(_last)

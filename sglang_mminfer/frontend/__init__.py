"""SGLang frontend programs with images and videos in every turn. For clients: nothing here runs in a server.

    import sglang as sgl
    from sglang_mminfer.frontend import MediaEndpoint

    sgl.set_default_backend(MediaEndpoint("http://127.0.0.1:30000"))

After that `sgl.image`, `sgl.video`, `gen`, `select`, `fork` and streams work as SGLang documents them, in any number
and in any turn. A program has the token ids of the same chat through /v1/chat/completions, so both find each other's
prefixes in the radix cache.
"""

from __future__ import annotations

from sglang_mminfer.frontend import executor
from sglang_mminfer.frontend.endpoint import MediaEndpoint
from sglang_mminfer.frontend.engine import EngineEndpoint
from sglang_mminfer.frontend.media import MediaError

executor.install()

__all__ = ["EngineEndpoint", "MediaEndpoint", "MediaError"]

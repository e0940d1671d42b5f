"""Who reads the requests of a server: SGLang's tokenizer process, where our hooks are, or a program without them."""

from __future__ import annotations

from typing import Any

from sglang_mminfer.mends import routed


def read_elsewhere(server_args: Any) -> str | None:
    """Where requests or their media are read by what loads no plugins, as the end of a sentence; None: all are read
    by SGLang's one tokenizer process."""
    from sglang.srt.environ import envs

    if server_args.language_only or server_args.encoder_only:
        return "where media are encoded by another server"
    if routed.by_router(server_args):
        return "where another program tokenizes (--grpc-mode)"
    if server_args.tokenizer_worker_num > 1:
        return "by tokenizer workers, which load no plugins (--tokenizer-worker-num)"
    if envs.SGLANG_RUST_SERVER.get():
        return "behind the Rust server, which loads no plugins (SGLANG_RUST_SERVER)"
    return None

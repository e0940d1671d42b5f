"""What a launch comes to, up to the start of its processes, in a process of its own. Run as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHOW = "LAUNCH "


def launch(*steps: dict[str, Any], environ: dict[str, str | None] | None = None) -> list[dict[str, Any]]:
    """What `examine` gives for each of these arguments, one after the other in one process."""
    environment = {**os.environ, "SGLANG_PLATFORM": None, "HF_HUB_OFFLINE": "1", **(environ or {})}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(steps)],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in environment.items() if value is not None},
    )
    found = [json.loads(line[len(SHOW) :]) for line in done.stdout.splitlines() if line.startswith(SHOW)]
    assert len(found) == len(steps), done.stderr[-3000:]
    return found


def examine(fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments resolved as by Engine(**fields), and what SGLang takes for the model then."""
    import msgspec
    from sglang.srt import platforms
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    _HUB.clear()
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(**fields)
    try:
        server_args.resolve_once()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "platform": os.environ.get("SGLANG_PLATFORM")}
    view, model = resolving_view(server_args), model_config_of(server_args)
    from sglang.srt.managers.multimodal_processor import get_mm_processor_cls, import_processors
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import publish

    model_class, _ = get_model_architecture(model)
    publish(server_args, role="tokenizer")
    import_processors("sglang.srt.multimodal.processors")
    processor = get_mm_processor_cls(model.hf_config, model)
    arguments = {}
    for field in msgspec.structs.fields(ServerArgs):
        if field.name not in ("random_seed", "port", "nccl_port", "dist_init_addr"):
            arguments[field.name] = repr(getattr(view, field.name))
    return {
        "arguments": arguments,
        "processor": processor and f"{processor.__module__}.{processor.__name__}",
        "config": type(model.hf_config).__name__,
        "model": f"{model_class.__module__}.{model_class.__name__}",
        "platform": os.environ.get("SGLANG_PLATFORM"),
        "platform_class": type(platforms.current_platform).__name__,
        "hooks": sorted(HookRegistry._patched),
        "hub": list(_HUB),
    }


_HUB: list[str] = []
"""Files that were looked for on the hub, and who looked."""


def _watch_the_hub() -> None:
    from transformers import utils

    original = utils.cached_file

    def cached_file(path: Any, name: str, **kwargs: Any) -> Any:
        _HUB.append(f"{name} by {Path(sys._getframe(1).f_code.co_filename).name}")
        return original(path, name, **kwargs)

    utils.cached_file = cached_file


def main() -> None:
    _watch_the_hub()
    for fields in json.loads(sys.argv[1]):
        print(SHOW + json.dumps(examine(fields)), flush=True)


if __name__ == "__main__":
    main()

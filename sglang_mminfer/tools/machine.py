"""Describes where figures were measured, for result files."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("sglang-mminfer", "sglang", "torch", "transformers", "triton", "flash-attn-4", "nvidia-cutlass-dsl")


def describe() -> dict[str, object]:
    """The machine, the versions of packages and this process's command, as JSON values."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "isa": torch.backends.cpu.get_cpu_capability(), "gpu": gpu},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name

"""`mminfer doctor`: what is installed, what SGLang sees of it, what would run for a model, and what to mend.

The doctor asks SGLang itself: SGLang's loader loads the plugin, and SGLang resolves the arguments for a given model as
at the start of a server.
"""

from __future__ import annotations

import json
import os
import platform as host
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sglang_mminfer import settings
from sglang_mminfer.tools.doctor.finding import Finding, brief
from sglang_mminfer.tools.doctor.model import examine_model
from sglang_mminfer.tools.doctor.model import server_args_of as server_args_of
from sglang_mminfer.tools.doctor.terminal import print_findings, quiet, waiting

if TYPE_CHECKING:
    import torch

    from sglang_mminfer.tools.doctor.video import VideoOptions

DISTRIBUTION = "sglang-mminfer"
GROUPS = {"sglang.srt.plugins": "mminfer", "sglang.srt.platforms": "mminfer_cpu"}

_SHOWN = ("sglang", "torch", "transformers")  # requirements with a line; the others have one only if they do not fit
_OPTIONAL = ("triton", "flash-attn-4", "flashinfer-python", "sglang-kernel")  # not required, but shown if installed


def run(
    model_path: str | None,
    config_name: str | None,
    *,
    as_json: bool = False,
    video: VideoOptions | None = None,
    launch: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> int:
    """Print the report. Returns the exit status: 1 if there is an error, else 0.

    Args:
        model_path: a folder or a hub name; None: no model is checked.
        config_name: the value of --mminfer-config; None: that of the setting.
        as_json: print the findings as one JSON object.
        video: a video to examine; needs a model.
        launch: fields of the server's arguments beside the model and the config.
        quick: versions and settings alone; SGLang and torch are not imported.
    """
    if quick:
        findings = [*examine_versions(), *_settings()]
    else:
        with waiting() as show_section, quiet() as problems:
            findings = list(examine(model_path, config_name, problems, video, launch, show_section))
    ok = all(finding.status != "error" for finding in findings)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print_findings(findings, ok)
    return 0 if ok else 1


def examine(
    model_path: str | None = None,
    config_name: str | None = None,
    problems: list[str] | None = None,
    video: VideoOptions | None = None,
    launch: Mapping[str, Any] | None = None,
    show_section: Callable[[str], None] = lambda section: None,
) -> Iterator[Finding]:
    """All findings, section by section.

    Args:
        problems: receives the errors that SGLang logs meanwhile; see `terminal.quiet`.
        show_section: called with the name of each section before its checks.
    """
    problems = [] if problems is None else problems
    sections: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("installed", examine_versions),
        ("plugin", lambda: _plugin(problems)),
        ("settings", _settings),
        ("mends", _mends),
        ("machine", _machine),
        ("gpu", examine_gpu),
        ("video", _video),
        ("model", lambda: examine_model(model_path, config_name, launch)),
    ]
    if video is not None and model_path is not None:
        from sglang_mminfer.tools.doctor import video as doctor_video

        sections.append(
            (doctor_video.SECTION, lambda: doctor_video.examine_video(model_path, config_name, video, launch))
        )
    for section, check in sections:
        show_section(section)
        try:
            yield from check()
        except Exception as error:  # a report that stops half-way helps nobody
            yield Finding(
                section,
                section,
                "error",
                f"cannot be checked: {brief(error)}",
                f"mend the import or setting named here; `pip install --force-reinstall {DISTRIBUTION}` "
                "restores the package and what it needs.",
            )


# Sections


def examine_versions() -> Iterator[Finding]:
    """The versions of this package, of what it requires, and of optional kernel packages."""
    from packaging.requirements import Requirement

    yield Finding("installed", "python", "ok", host.python_version())
    try:
        yield Finding("installed", DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
        required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            "installed",
            DISTRIBUTION,
            "error",
            "importable, but not installed: SGLang finds plugins by their distribution",
            "run `pip install -e .` in the checkout, in the environment that runs SGLang.",
        )
        return
    fitting = 0
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = version_of(requirement.name)
        if installed and requirement.specifier.contains(installed, prereleases=True):
            fitting += 1
            if requirement.name in _SHOWN:
                yield Finding("installed", requirement.name, "ok", f"{installed}  (needs {requirement.specifier})")
        elif installed and _is_newer(installed, requirement):
            yield Finding(
                "installed",
                requirement.name,
                "warning",
                f"{installed} is untested (the tests were run with {requirement.specifier})",
                f"run `pip install '{requirement.name}{requirement.specifier}'`, or see what the hooks below say.",
            )
        else:
            yield Finding(
                "installed",
                requirement.name,
                "error",
                f"{installed or 'missing'}  (needs {requirement.specifier or 'any version'})",
                f'run `pip install "{requirement}"`.',
            )
    yield Finding("installed", "requirements", "ok", f"{fitting} of them fit")
    optional = [f"{name} {version}" for name in _OPTIONAL if (version := version_of(name))]
    yield Finding("installed", "kernels of others", "note", ", ".join(optional) or "none")


def _plugin(problems: list[str]) -> Iterator[Finding]:
    for group, name in GROUPS.items():
        owners = [entry.dist.name if entry.dist else "?" for entry in metadata.entry_points(group=group, name=name)]
        if DISTRIBUTION not in owners:
            yield Finding(
                "plugin",
                f"entry point {name}",
                "error",
                f"not in group {group}",
                f"reinstall {DISTRIBUTION}: its metadata is older than its code.",
            )
    yield from examine_filters(os.environ.get("SGLANG_PLUGINS"), os.environ.get("SGLANG_PLATFORM"))

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from sglang_mminfer import plugin
    from sglang_mminfer.serving import cpu_platform, hooks

    if settings.BACKEND_NAME in ATTENTION_BACKENDS and settings.BACKEND_NAME in ATTENTION_BACKEND_CHOICES:
        yield Finding("plugin", "attention backend", "ok", f"SGLang knows {settings.BACKEND_NAME!r}")
    else:
        logged = f"; SGLang says: {problems[-1]}" if problems else ""
        yield Finding(
            "plugin",
            "attention backend",
            "error",
            f"SGLang did not take the plugin{logged}",
            "mend the errors of this section; if there are none, this SGLang is not one that the package was made for.",
        )
    hooks.install("mminfer")
    there = [hook for hook in plugin.HOOKS if hook.target_exists()]  # imports the targets' modules
    without_target = [hook for hook in plugin.HOOKS if hook.is_missed()]
    missing = [hook.target for hook in without_target]
    on_cpu = cpu_platform.selected()
    due = [hook for hook in there if on_cpu or hook.when != ("cpu",)]
    unapplied = [hook.target for hook in hooks.unapplied(due)]
    total = len(there) + len(missing)
    if missing:
        yield Finding(
            "plugin",
            "hooks",
            "error" if any(hook.essential for hook in without_target) else "warning",
            f"{len(missing)} of {total} find no target: {', '.join(missing)}"
            + (" (none of them essential)" if not any(hook.essential for hook in without_target) else ""),
            f"this SGLang moved them; install one that fits: {_needed('sglang')}.",
        )
    elif unapplied:
        yield Finding(
            "plugin",
            "hooks",
            "error",
            f"not applied: {', '.join(unapplied)}",
            "see the errors above; start SGLang with --log-level debug for its reasons.",
        )
    else:
        later = len(plugin.HOOKS) - total
        more = f"; {later} more are of later releases of SGLang" if later else ""
        yield Finding("plugin", "hooks", "ok", f"all {total} targets are there{more}")


def examine_filters(plugins: str | None, selected: str | None) -> Iterator[Finding]:
    """Whether SGLang's filters let the plugin through.

    Args:
        plugins: the value of SGLANG_PLUGINS, None if it is not set.
        selected: the value of SGLANG_PLATFORM, None if it is not set.
    """
    allowed = {name.strip() for name in (plugins or "").split(",") if name.strip()}
    if not allowed:
        yield Finding("plugin", "SGLANG_PLUGINS", "ok", "not set, so every plugin is loaded")
    elif hidden := sorted(set(GROUPS.values()) - allowed):
        needed = "mminfer" in hidden
        yield Finding(
            "plugin",
            "SGLANG_PLUGINS",
            "error" if needed else "warning",
            f"{plugins} leaves out {', '.join(hidden)} (the list counts for platforms, too)",
            f"unset it, or set SGLANG_PLUGINS={','.join([*sorted(allowed), *hidden])}.",
        )
    else:
        yield Finding("plugin", "SGLANG_PLUGINS", "ok", str(plugins))
    if not selected:
        yield Finding("plugin", "SGLANG_PLATFORM", "ok", "not set")
    elif selected == GROUPS["sglang.srt.platforms"]:
        yield Finding("plugin", "SGLANG_PLATFORM", "ok", f"{selected}: the CPU platform is forced")
    else:
        yield Finding(
            "plugin",
            "SGLANG_PLATFORM",
            "error",
            f"{selected}: SGLang then skips every plugin of a distribution that brings another platform, and this one "
            "brings mminfer_cpu",
            "unset it; SGLang finds the hardware without it.",
        )


def _settings() -> Iterator[Finding]:
    """The value of each setting that is set, and the defaults of the others that have one, because a server's --help
    shows none."""
    defaults = []
    for setting in settings.SETTINGS:
        if value := setting.read():
            note = f" ({setting.flag} of a server wins over it)" if setting.flag else ""
            yield Finding("settings", setting.variable, "ok", f"{value}{note}")
        elif setting.default:
            defaults.append(f"{setting.variable.removeprefix(settings.PREFIX)}={setting.default}")
    if defaults:
        yield Finding("settings", f"{settings.PREFIX}*", "note", f"not set, so default: {', '.join(defaults)}")
    yield Finding(
        "settings",
        "flags of a server",
        "note",
        "shown by `python -m sglang.launch_server --help`; `sglang serve --help` prints before it loads plugins",
    )


def _mends() -> Iterator[Finding]:
    from sglang_mminfer import mends

    if why := mends.why_bad():
        yield Finding(
            "mends", "setting", "error", why, f"correct {settings.MENDS.variable}, or unset it to have all mends."
        )
        return
    on = mends.active_names()
    off = [mend.name for mend in mends.MENDS if mend.name not in on]
    named = f"all {len(on)}, which docs/mends.md tells" if not off else ", ".join(on) or "none"
    yield Finding("mends", "on", "ok", named)
    if off:
        yield Finding(
            "mends", "off", "note", f"{', '.join(off)} ({settings.MENDS.variable}, or not a fault of this SGLang)"
        )


def _machine() -> Iterator[Finding]:
    import torch
    from sglang.srt.platforms import current_platform

    from sglang_mminfer.serving import cpu_platform

    kinds = cpu_platform.accelerators()
    if kinds == ("cuda",):
        yield Finding("machine", "accelerator", "ok", torch.cuda.get_device_name(0))
    elif kinds:
        yield Finding(
            "machine",
            "accelerator",
            "warning",
            f"{', '.join(kinds)}: mminfer was never tried there",
            "treat answers and speed as unknown, or use an NVIDIA GPU or a CPU.",
        )
    elif os.path.exists("/dev/nvidia0"):
        yield Finding(
            "machine",
            "accelerator",
            "error",
            f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it",
            "install a torch built for this driver's CUDA, or launch with --device cpu to run on the CPU on purpose.",
        )
    else:
        cores = len(os.sched_getaffinity(0))
        memory = cpu_platform.MMInferCpuPlatform().get_device_total_memory() / 2**30
        yield Finding("machine", "accelerator", "note", f"none; {cores} CPU cores, {memory:.0f} GiB of memory")
    reason = cpu_platform.why_unfit()
    if cpu_platform.is_active():
        yield Finding("machine", "platform", "ok", "mminfer_cpu is active: SGLang runs on plain torch")
    elif kinds:
        yield Finding("machine", "platform", "ok", f"SGLang's own ({current_platform.device_name}): {reason}")
    elif reason is None:
        yield Finding(
            "machine",
            "platform",
            "note",
            "none that SGLang takes by itself; launched with --device cpu it runs on plain torch (mminfer_cpu), as in "
            "what follows here",
        )
    else:
        yield Finding(
            "machine",
            "platform",
            "error",
            f"no platform for this machine: {reason}",
            "unset SGLANG_PLUGINS, SGLANG_PLATFORM and SGLANG_USE_CPU_ENGINE (SGLang's CPU engine needs a "
            "kernel package that is not on the package index).",
        )


def examine_gpu() -> Iterator[Finding]:
    """The GPU, and whether the kernel that is compiled for it gives right answers."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", "gpu", "note", "none that torch can use: the kernel is not compiled")
        return
    card = torch.cuda.get_device_properties(0)
    text = f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB"
    if (card.major, card.minor) < (8, 0):
        yield Finding("gpu", "gpu", "error", text, "the kernel needs compute capability 8.0 (A100) or newer.")
        return
    yield Finding("gpu", "gpu", "ok", text)
    for dtype in (torch.bfloat16, torch.float16):
        yield check_kernel("cuda", dtype)


def check_kernel(device: str, dtype: torch.dtype) -> Finding:
    """Run the Triton kernel on the small cases that a server checks it with, and compare it with float64."""
    from sglang_mminfer.kernels.triton import launch
    from sglang_mminfer.serving import self_check

    name = f"kernel, {str(dtype).removeprefix('torch.')}"
    try:
        answer = self_check.check(launch.run, device, dtype, HEAD_DIM, estimates=True)
    except Exception as error:  # for example a compiler that does not fit
        return Finding("gpu", name, "error", f"does not run: {brief(error)}", _OTHER_EXECUTOR)
    if answer.good:
        return Finding("gpu", name, "ok", str(answer))
    return Finding("gpu", name, "error", f"wrong answers: {answer}", _OTHER_EXECUTOR)


HEAD_DIM = 128
"""The head dimension with which the kernel is checked."""

_OTHER_EXECUTOR = (
    "install the triton that this torch requires, or try SGLANG_MMINFER_EXECUTOR=flashinfer; until then a server finds "
    "the same at start-up and runs dense."
)


def _video() -> Iterator[Finding]:
    usable, reason = _torchcodec()
    if usable:
        yield Finding("video", "torchcodec", "ok", f"{version_of('torchcodec')}, with FFmpeg's libraries")
    elif decord := version_of("decord"):
        import decord as _  # noqa: F401 - an installed decord that does not import is an error

        yield Finding("video", "torchcodec", "note", reason)
        yield Finding("video", "decord", "ok", f"{decord} decodes video instead")
    else:
        yield Finding(
            "video",
            "decoder",
            "error",
            f"{reason}, and decord is missing",
            "run `pip install decord`, or install FFmpeg's shared libraries for torchcodec.",
        )


# Helpers


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _is_newer(installed: str, requirement: Any) -> bool:
    """Whether this is an SGLang newer than those that the tests were run with. It may work, but nobody has tried."""
    from packaging.version import Version

    lowest = (Version(clause.version) for clause in requirement.specifier if clause.operator == ">=")
    return requirement.name == "sglang" and all(Version(installed) > version for version in lowest)


def _needed(name: str) -> str:
    return next((text for text in metadata.requires(DISTRIBUTION) or () if text.startswith(name)), name)


def _torchcodec() -> tuple[bool, str]:
    """Whether torchcodec decodes, and why not if it does not. It looks for FFmpeg only when a decoder is made."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError):
        return False, "not installed, or its libraries do not load"
    try:
        VideoDecoder(b"\0" * 64)
    except Exception as error:
        if "Could not load libtorchcodec" in str(error):
            return False, f"{version_of('torchcodec')} finds no FFmpeg libraries"
    return True, ""

"""A place where SGLang is extended or changed, and how it is done. The list of all of them is `plugin.HOOKS`."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sglang_mminfer import settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hook:
    """One place where SGLang is extended or changed.

    Attributes:
        target: dotted path in SGLang; for kind "resolution" the name of a step of argument resolution.
        kind: before, after, around: SGLang's HookRegistry. resolution: its resolution hooks. choice: a name
            added to a list of choices. backend: a factory in the attention registry.
        function: `module:name` of ours, imported when the hook is installed.
        reason: why SGLang cannot do without it.
        essential: without it answers could be wrong, so where SGLang lacks the target no server starts with mminfer.
            Others are left out with a warning.
    """

    target: str
    kind: Literal["before", "after", "around", "resolution", "choice", "backend"]
    function: str
    reason: str
    essential: bool = False

    def resolve(self) -> Callable[..., Any]:
        """Our function."""
        return pkgutil.resolve_name(self.function)

    def target_exists(self) -> bool:
        """Whether this SGLang has the place that is hooked."""
        if self.kind == "resolution":
            from sglang.srt.arg_groups.resolution_hooks import _OVERRIDABLE_HOOKS

            return self.target in _OVERRIDABLE_HOOKS
        try:
            found = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError):
            return False
        kinds = {"choice": list, "backend": dict}
        return isinstance(found, kinds[self.kind]) if self.kind in kinds else callable(found)


missing: list[Hook] = []
"""Hooks whose targets this SGLang does not have. A launch with mminfer is told, and nobody else."""


def install(hook: Hook) -> None:
    """Installs a hook, or notes that it has no target."""
    if not hook.target_exists():
        missing.append(hook)
        return
    function = hook.resolve()
    if hook.kind == "choice":
        function(pkgutil.resolve_name(hook.target))
    elif hook.kind == "backend":
        registry = pkgutil.resolve_name(hook.target)
        registry.setdefault(settings.BACKEND_NAME, function)
    elif hook.kind == "resolution":
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook(hook.target)(function)
    else:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(hook.target, function, HookType(hook.kind))


class UnsupportedLaunch(ValueError):
    """A combination of arguments that mminfer cannot serve."""


def check_installation() -> None:
    """Says what of SGLang is not there that this package hooks.

    Raises:
        UnsupportedLaunch: if mminfer cannot do without it.
    """
    from importlib.metadata import version

    installed = version("sglang")
    if essential := [hook.target for hook in missing if hook.essential]:
        raise UnsupportedLaunch(
            f"mminfer: SGLang {installed} has no {', '.join(essential)}, without which answers could be wrong; install "
            f"sglang{settings.TESTED_SGLANG}, or drop --attention-backend mminfer."
        )
    for hook in missing:
        logger.warning("mminfer: SGLang %s has no %s, so this goes unmended: %s", installed, hook.target, hook.reason)

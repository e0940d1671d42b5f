"""A place where SGLang is extended or changed, and how it is done. The list of all of them is `plugin.HOOKS`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from sglang_mminfer import settings

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

logger = logging.getLogger(__name__)

When = Literal["load", "mminfer", "cpu"]


@dataclass(frozen=True)
class Hook:
    """One place where SGLang is extended or changed.

    Attributes:
        target: dotted path in SGLang; for kind "resolution" the name of a step of argument resolution.
        kind: before, after, around: as in SGLang's HookRegistry. resolution: its resolution hooks. choice: a name
            added to a list of choices. backend: a factory in the attention registry.
        function: `module:name` of ours, imported when the hook is installed.
        reason: why SGLang cannot do without it.
        essential: without it answers could be wrong, so where SGLang lacks the target no server starts with mminfer.
            Others are left out with a warning.
        when: what makes it needed. load: every process of every server has it. mminfer: a server with mminfer; it is
            installed when a process learns that it works for one. cpu: a server on our CPU platform.
    """

    target: str
    kind: Literal["before", "after", "around", "resolution", "choice", "backend"]
    function: str
    reason: str
    essential: bool = False
    when: tuple[When, ...] = ("mminfer",)

    @property
    def module(self) -> str:
        """The module of SGLang that holds the function; a class's name begins with a capital."""
        *path, _ = self.target.split(".")
        return ".".join(itertools.takewhile(lambda part: part[0].islower(), path))

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


_declared: tuple[Hook, ...] = ()
_begun: list[Hook] = []
"""Those that `install` was called for; a few may wait for the import of their module."""
_applied: set[Hook] = set()


def declare(every: tuple[Hook, ...]) -> None:
    """Say which hooks there are: `install` takes from them alone, and `check_installation` looks at them alone."""
    global _declared
    _declared = every


def install(when: When) -> None:
    """Install the hooks that are needed from now on. Those that are there already stay as they are.

    SGLang applies what is registered while it loads plugins, and nothing later; and it searches all modules once for
    each hook. So "load" goes through its HookRegistry, in company with the hooks of other plugins, and the many that
    come later are applied here, with one search for all. A module that this process has not imported is not imported
    for its hooks: they are applied when somebody imports it.
    """
    due = [hook for hook in _declared if when in hook.when and hook not in _begun]
    _begun.extend(due)
    functions = [hook for hook in due if hook.kind in ("before", "after", "around")]
    for hook in due:
        if hook not in functions:
            _extend(hook)
    if when == "load":
        for hook in functions:
            _register(hook)
    else:
        _apply([hook for hook in functions if hook.module in sys.modules])
        _importer.wait([hook for hook in functions if hook.module not in sys.modules])


def note(server_args: Any) -> None:
    """BEFORE ServerArgs.resolve_once: the first to know whether this process works for a server with mminfer."""
    from sglang_mminfer.mends import asked

    asked.note(server_args)
    if asked.for_mminfer():
        install("mminfer")


def unapplied(some: Iterable[Hook]) -> list[Hook]:
    """Those of some hooks on functions that are not in place."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    def there(hook: Hook) -> bool:
        return hook.target in HookRegistry._patched if "load" in hook.when else hook in _applied

    return [hook for hook in some if hook.kind in ("before", "after", "around") and not there(hook)]


def _extend(hook: Hook) -> None:
    """Install a hook that adds to a list, a registry or a step of SGLang."""
    if not hook.target_exists():
        return
    function = hook.resolve()
    if hook.kind == "choice":
        function(pkgutil.resolve_name(hook.target))
    elif hook.kind == "backend":
        pkgutil.resolve_name(hook.target).setdefault(settings.BACKEND_NAME, function)
    else:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook(hook.target)(function)


def _register(hook: Hook) -> None:
    """Have SGLang install a hook on a function."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hook.target_exists():
        HookRegistry.register(hook.target, hook.resolve(), HookType(hook.kind))


def _apply(functions: list[Hook]) -> None:
    """Install hooks on functions as SGLang's HookRegistry does: where they stand, and wherever a module has imported
    them by name."""
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    replacements: dict[int, tuple[Any, Any]] = {}
    for hook in functions:
        if not hook.target_exists():
            continue
        path, _, name = hook.target.rpartition(".")
        holder = pkgutil.resolve_name(path)
        declared = vars(holder).get(name)
        decorator = type(declared) if isinstance(declared, classmethod | staticmethod) else None
        original = declared.__func__ if isinstance(declared, classmethod | staticmethod) else getattr(holder, name)
        wrapped: Any = _wrap_fn(original, hook.resolve(), HookType(hook.kind))
        setattr(holder, name, decorator(wrapped) if decorator else wrapped)
        replacements[id(original)] = original, wrapped  # the original is kept, so its id stays its own
        _applied.add(hook)
    if replacements:
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                for name, value in list(vars(module).items()):
                    if id(value) in replacements:
                        with contextlib.suppress(AttributeError, TypeError):  # modules that nobody may write to
                            setattr(module, name, replacements[id(value)][1])


class _Importer:
    """Applies hooks on modules right after their import: a finder for sys.meta_path."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Hook]] = {}

    def wait(self, functions: list[Hook]) -> None:
        """Apply these when their modules are imported."""
        for hook in functions:
            self._waiting.setdefault(hook.module, []).append(hook)
        if self._waiting and self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; for a module that is waited for, with a loader that applies its hooks."""
        if fullname not in self._waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _apply(self._waiting.pop(fullname, []))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_importer = _Importer()


class UnsupportedLaunch(ValueError):
    """A combination of arguments that mminfer cannot serve."""


def check_installation() -> None:
    """Says what of SGLang is not there that this package hooks.

    Raises:
        UnsupportedLaunch: if mminfer cannot do without it.
    """
    from importlib.metadata import version

    installed = version("sglang")
    missing = [hook for hook in _declared if hook in _begun and not hook.target_exists()]
    if essential := [hook.target for hook in missing if hook.essential]:
        raise UnsupportedLaunch(
            f"mminfer: SGLang {installed} has no {', '.join(essential)}, without which answers could be wrong; install "
            f"sglang{settings.TESTED_SGLANG}, or drop --attention-backend mminfer."
        )
    for hook in missing:
        logger.warning("mminfer: SGLang %s has no %s, so this goes unmended: %s", installed, hook.target, hook.reason)

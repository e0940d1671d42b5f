"""A place where SGLang is extended or changed, and how it is done. The list of all of them is `plugin.HOOKS`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
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
        since: the release of SGLang that brought what is hooked; "" if all have it. Older ones do not miss the hook.
        formerly: the target in older releases of SGLang that we know; "" if it is the same in all.
        when: what makes it needed. load: every process of every server has it. mminfer: a server with mminfer; it is
            installed when a process learns that it works for one. cpu: a server on our CPU platform.
    """

    target: str
    kind: Literal["before", "after", "around", "resolution", "choice", "backend"]
    function: str
    reason: str
    essential: bool = False
    since: str = ""
    when: tuple[When, ...] = ("mminfer",)
    formerly: str = ""

    @property
    def module(self) -> str:
        """The module of SGLang that holds the function; a class's name begins with a capital."""
        *path, _ = self.target.split(".")
        return ".".join(itertools.takewhile(lambda part: part[0].islower(), path))

    @property
    def on_function(self) -> bool:
        """Whether it is installed on a function, and not in a list, a registry or a step of argument resolution."""
        return self.kind in ("before", "after", "around")

    def resolve(self) -> Callable[..., Any]:
        """Our function."""
        return pkgutil.resolve_name(self.function)

    def at_each_place(self) -> list[Hook]:
        """This hook at every place where its target may be. A release of SGLang has one of them."""
        return [replace(self, target=target, formerly="") for target in (self.target, self.formerly) if target]

    def target_exists(self) -> bool:
        """Whether this SGLang has the place that is hooked. A module that cannot be imported has nothing."""
        if self.formerly:
            return any(hook.target_exists() for hook in self.at_each_place())
        try:
            if self.kind == "resolution":
                from sglang.srt.arg_groups.resolution_hooks import _OVERRIDABLE_HOOKS

                return self.target in _OVERRIDABLE_HOOKS
            found = pkgutil.resolve_name(self.target)
        except Exception:
            return False
        kinds = {"choice": list, "backend": dict}
        return isinstance(found, kinds[self.kind]) if self.kind in kinds else callable(found)

    def is_missed(self) -> bool:
        """Whether this SGLang should have the place that is hooked, and has not."""
        from packaging.version import Version

        return not self.target_exists() and (not self.since or Version(version("sglang")) >= Version(self.since))


_declared: tuple[Hook, ...] = ()
_begun: list[Hook] = []
"""Those that `install` was called for; a few may wait for the import of their module."""
_applied: set[Hook] = set()
_failed: dict[Hook, str] = {}
"""Those that could not be installed, and why: SGLang is not as they expect, or a defect of ours."""


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
    functions = [hook for hook in due if hook.on_function]
    for hook in due:
        if not hook.on_function:
            _try(_extend, hook)
    if when == "load":
        for hook in functions:
            _try(_register, hook)
    else:
        places = [place for hook in functions for place in hook.at_each_place()]
        _apply([hook for hook in places if hook.module in sys.modules])
        _importer.wait([hook for hook in places if hook.module not in sys.modules])


def _try(how: Callable[[Hook], None], hook: Hook) -> None:
    """Install a hook. An error is kept for `check_installation`: a server that needs no hook must not meet it."""
    try:
        how(hook)
    except Exception as error:
        _note_failure(hook, error)


def _note_failure(hook: Hook, error: Exception) -> None:
    _failed[hook] = f"{type(error).__name__}: {error}"


def note(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ServerArgs.resolve_once: the first to know whether this process works for a server with mminfer."""
    from sglang_mminfer.mends import asked

    asked.note(server_args)
    if asked.for_mminfer():
        install("mminfer")


def unapplied(some: Iterable[Hook]) -> list[Hook]:
    """Those of some hooks on functions that are not in place."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    def there(hook: Hook) -> bool:
        if "load" in hook.when:
            return hook.target in HookRegistry._patched
        return any(place in _applied for place in hook.at_each_place())

    return [hook for hook in some if hook.on_function and not there(hook)]


def _extend(hook: Hook) -> None:
    """Install a hook that adds to a list, a registry or a step of SGLang."""
    if not hook.target_exists():
        return
    function = _guarded(hook)
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
        HookRegistry.register(hook.target, _guarded(hook), HookType(hook.kind))


def _guarded(hook: Hook) -> Callable[..., Any]:
    """Our function for a place that every server passes, so that an error in it ends no server without mminfer.

    A changed SGLang makes ours raise one of four kinds of errors. After one of those SGLang's own function runs, unless
    it has run already, and the log has one line. Every other error goes on: refusals of a launch, and SGLang's own.
    """
    function = hook.resolve()
    if hook.kind in ("choice", "backend"):
        return function
    stock_at = {"around": 0, "resolution": 1}.get(hook.kind)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        raised: list[Exception] = []
        stock: Any = None if stock_at is None else args[stock_at]

        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                results.append(stock(*args, **kwargs))
            except Exception as error:
                raised.append(error)
                raise
            return results[-1]

        ours = list(args)
        if stock_at is not None:
            ours[stock_at] = watched
        try:
            return function(*ours, **kwargs)
        except (ImportError, AttributeError, TypeError, KeyError) as error:
            if raised or _wants_mminfer(args):
                raise
            _say_once(f"{hook.target}: a hook of mminfer failed and was passed by ({type(error).__name__}: {error}).")
        if stock_at is None:
            return None
        return results[-1] if results else stock(*args[:stock_at], *args[stock_at + 1 :], **kwargs)

    return guarded


def _wants_mminfer(args: Iterable[Any]) -> bool:
    """Whether server arguments, or those of a command line, are among the arguments of a hook and name mminfer."""
    from sglang_mminfer import mends

    return any(mends.wanted(arg) for arg in args)


@functools.cache
def _say_once(text: str) -> None:
    logger.warning("mminfer: %s", text)


def _apply(functions: list[Hook]) -> None:
    """Install hooks on functions as SGLang's HookRegistry does: where they stand, and wherever a module has imported
    them by name."""
    replacements: dict[int, tuple[Any, Any]] = {}
    for hook in functions:
        if not hook.target_exists():
            continue
        try:
            from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

            function = hook.resolve()
        except Exception as error:  # in the middle of an import of SGLang's, which must not fail for it
            _note_failure(hook, error)
            continue
        path, _, name = hook.target.rpartition(".")
        holder = pkgutil.resolve_name(path)
        declared = vars(holder).get(name)
        decorator = type(declared) if isinstance(declared, classmethod | staticmethod) else None
        original = declared.__func__ if isinstance(declared, classmethod | staticmethod) else getattr(holder, name)
        wrapped: Any = _wrap_fn(original, function, HookType(hook.kind))
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


def check_installation(warn: bool = True) -> None:
    """Says what of SGLang is not there that this package hooks.

    Args:
        warn: whether to name the hooks without which a server starts.

    Raises:
        UnsupportedLaunch: if mminfer cannot do without it.
    """
    installed = version("sglang")
    begun = [hook for hook in _declared if hook in _begun]
    missing = [hook for hook in begun if hook.is_missed()]
    if essential := [hook.target for hook in missing if hook.essential]:
        raise UnsupportedLaunch(
            f"mminfer: SGLang {installed} has no {', '.join(essential)}, without which answers could be wrong; install "
            f"sglang{settings.TESTED_SGLANG}, or drop --attention-backend mminfer."
        )
    failed = {hook: why for hook in begun if hook not in missing and (why := _why_failed(hook))}
    if essential := [f"{hook.target} ({why})" for hook, why in failed.items() if hook.essential]:
        raise UnsupportedLaunch(
            f"mminfer: with SGLang {installed} these hooks fail, without which answers could be wrong: "
            f"{', '.join(essential)}; install sglang{settings.TESTED_SGLANG}, or drop --attention-backend mminfer."
        )
    if not warn:
        return
    for hook in missing:
        logger.warning("mminfer: SGLang %s has no %s, so this goes unmended: %s", installed, hook.target, hook.reason)
    for hook, why in failed.items():
        logger.warning("mminfer: a hook on %s fails (%s), so this goes unmended: %s", hook.target, why, hook.reason)


def lacking(*functions: str) -> list[Hook]:
    """The hooks that this SGLang has no target for, or that could not be installed.

    Args:
        functions: how the hooks' functions of ours begin: `module:` or `module:name`, without the package's name.
    """
    begins = tuple(f"sglang_mminfer.{name}" for name in functions)
    return [hook for hook in _declared if hook.function.startswith(begins) and _lacks(hook)]


def _lacks(hook: Hook) -> bool:
    """Whether a hook has no target, or could not be installed."""
    return not hook.target_exists() or _why_failed(hook) is not None


def _why_failed(hook: Hook) -> str | None:
    """Why a hook whose target is there could not be installed; None if it was, or waits."""
    return next((_failed[place] for place in (hook, *hook.at_each_place()) if place in _failed), None)


def say_if_impossible() -> None:
    """One line in the log if this SGLang lacks what every server with mminfer needs from the start.

    Such a launch may end before `check_installation` can say so, because SGLang does not know the name.
    """
    import multiprocessing  # every process of every server imports this module, and few ask

    if multiprocessing.parent_process() is not None:
        return
    needed = [hook for hook in _declared if hook.essential and "load" in hook.when]
    if bad := [hook.target for hook in needed if _lacks(hook)]:
        logger.warning(
            "mminfer: SGLang %s lacks %s as this package knows it, so no server can start with --attention-backend "
            "mminfer; others are not affected. It was run with sglang%s.",
            version("sglang"),
            ", ".join(bad),
            settings.TESTED_SGLANG,
        )

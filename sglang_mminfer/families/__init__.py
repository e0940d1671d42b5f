"""Model families: how the media of a model are laid out, and what SGLang's classes for it need mended.

A family is one file here, or one folder, that defines a subclass of `base.Family`. No list names it: the modules of
this folder are imported when a family is first asked for, and never when the plugin is loaded.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_mminfer.families.base import Family


@functools.cache
def known() -> tuple[Family, ...]:
    """All families, sorted by name."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    from sglang_mminfer.families.base import REGISTERED

    here = (family() for family in REGISTERED if family.__module__.startswith(f"{__name__}."))
    return tuple(sorted(here, key=lambda family: family.name))


def family_of(hf_config: Any) -> Family | None:
    """The family of a model, by its config's `model_type`; None if no family names this type."""
    model_type = getattr(hf_config, "model_type", None)
    return next((family for family in known() if model_type in family.model_types), None)

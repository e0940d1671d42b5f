"""The words of `mminfer env`."""

from __future__ import annotations

import json as json_text
import textwrap

from sglang_mminfer import settings
from sglang_mminfer.commands import options


def env(json: options.AsJson = False) -> int:
    """List the environment variables: what is set here, the defaults, and what each means.

    A server's own flag wins over its variable. docs/settings.md is the same table.
    """
    shown = [setting for setting in settings.SETTINGS if not setting.internal]
    if json:
        rows = [
            {"variable": s.variable, "flag": s.flag, "value": s.read(), "default": s.default, "meaning": s.meaning}
            for s in shown
        ]
        print(json_text.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    for setting in shown:
        value = setting.read()
        flag = f", or {setting.flag}" if setting.flag else ""
        print(f"{setting.variable}={value or setting.default}{'' if value else '  (default)'}{flag}")
        print(textwrap.fill(setting.meaning, 116, initial_indent="    ", subsequent_indent="    "))
    return 0

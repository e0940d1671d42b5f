"""`python -m sglang_mminfer`: the command `mminfer`, where its script is not on the path."""

from __future__ import annotations

from sglang_mminfer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

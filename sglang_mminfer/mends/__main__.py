"""`python -m sglang_mminfer.mends` prints docs/mends.md."""

from sglang_mminfer.mends import page

print(page(), end="")

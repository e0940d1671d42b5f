"""Which packages there are, and the README for a package index; everything else stands in pyproject.toml.

kernels/ and head_configs/ stand at the top of the checkout and are imported from inside the package: the bare name
`kernels` belongs to another distribution that SGLang needs.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
OUTSIDE = ("kernels", "head_configs")

packages = find_packages(include=["sglang_mminfer", "sglang_mminfer.*"])
for name in OUTSIDE:
    packages += [f"sglang_mminfer.{name}", *(f"sglang_mminfer.{name}.{inner}" for inner in find_packages(name))]


def readme_for_an_index() -> str:
    """README.md with its relative links made absolute: the page of a package index has no files beside it."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    files = f"{project['urls']['Repository']}/blob/main/"
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({files}", (HERE / "README.md").read_text(encoding="utf-8"))


setup(
    packages=packages,
    package_dir={f"sglang_mminfer.{name}": name for name in OUTSIDE},
    long_description=readme_for_an_index(),
    long_description_content_type="text/markdown",
)

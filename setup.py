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
RELATIVE_LINK = r"\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)"

packages = find_packages(include=["sglang_mminfer", "sglang_mminfer.*"])
for name in OUTSIDE:
    packages += [f"sglang_mminfer.{name}", *(f"sglang_mminfer.{name}.{inner}" for inner in find_packages(name))]


def readme_for_an_index() -> str:
    """README.md without relative links: the page of a package index has no files beside it.

    They begin with `Repository` of the project's urls. As long as pyproject.toml names none, their words stay alone.
    """
    urls = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    files = f"[\\1]({urls['Repository']}/blob/main/\\2)" if "Repository" in urls else "\\1"
    return re.sub(RELATIVE_LINK, files, (HERE / "README.md").read_text(encoding="utf-8"))


setup(
    packages=packages,
    package_dir={f"sglang_mminfer.{name}": name for name in OUTSIDE},
    long_description=readme_for_an_index(),
    long_description_content_type="text/markdown",
)

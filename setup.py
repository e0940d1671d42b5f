"""Which packages there are; everything else stands in pyproject.toml.

kernels/ and head_configs/ stand at the top of the checkout and are imported from inside the package: the bare name
`kernels` belongs to another distribution that SGLang needs.
"""

from setuptools import find_packages, setup

OUTSIDE = ("kernels", "head_configs")

packages = find_packages(include=["sglang_mminfer", "sglang_mminfer.*"])
for name in OUTSIDE:
    packages += [f"sglang_mminfer.{name}", *(f"sglang_mminfer.{name}.{inner}" for inner in find_packages(name))]
setup(packages=packages, package_dir={f"sglang_mminfer.{name}": name for name in OUTSIDE})

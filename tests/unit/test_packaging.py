"""What a user gets who installs the package, and not the checkout."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    homes = {"sglang_mminfer": "sglang_mminfer", "kernels": "sglang_mminfer.kernels"}
    homes["head_configs"] = "sglang_mminfer.head_configs"
    there = []
    for folder, name in homes.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            there.append(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert sorted(listed) == sorted(there)


def test_the_doctor_needs_nothing_of_what_it_examines():
    """Not even its command line: it must run where torch, say, is broken."""
    program = (
        "import sys\nfrom sglang_mminfer import cli\n"
        "try: cli.main(['doctor', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'sglang', 'triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

"""The head configs of the tests: tests/head_configs/, which no wheel has."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "head_configs"


def config_file(name: str) -> str:
    """What HeadConfig.load and --mminfer-config take for a name: the path of a test's config, else the name itself."""
    path = FOLDER / f"{name}.json"
    return str(path) if path.is_file() else name

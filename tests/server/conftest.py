"""Each server starts once for all tests that need it. Few servers run at a time, and none outlives the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import probe
from families_served import (
    DRAFTED_SERVERS,
    FAMILY_SERVERS,
    MIXED_SERVERS,
    drafted_server,
    family_server,
    mixed_server,
)
from fleet import Fleet
from serving import (
    ENVIRONMENT,
    FLAGS,
    RECIPE,
    RETRACTS,
    Dialogue,
    Media,
    Message,
    References,
    Served,
    scripted,
    serve,
    text,
    user,
    video,
    write_sparse_config,
)
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools.media import make_image, make_video

NAMES = [*FLAGS, *MIXED_SERVERS, *FAMILY_SERVERS, *DRAFTED_SERVERS]

AFTER_DRAFTS = ("eagle3", *DRAFTED_SERVERS)
"""Servers that are not started before a test asks for them: the test makes their draft model first."""

PROBED = "mixed_internvl"
"""The server that loads the probe; see probe.py."""

ORDER = pytest.StashKey[list[str]]()
"""Servers in the order in which tests need them."""

OUTCOMES = pytest.StashKey[dict[str, dict[str, str]]]()
"""The outcome of each test on each family's server."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", metavar="FILE", help="adds to FILE how the tests of each server ended")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "server(name): the server of a test; tests of one server run together")
    config.stash[OUTCOMES] = {}


def _server_of(item: pytest.Item) -> str | None:
    name = getattr(item, "callspec", None) and item.callspec.params.get("name")  # type: ignore[attr-defined]
    marker = item.get_closest_marker("server")
    return name if name in NAMES else marker.args[0] if marker else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of one server next to each other, so that each server is started once; those without one last."""
    items.sort(key=lambda item: NAMES.index(name) if (name := _server_of(item)) else len(NAMES))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    server = _server_of(item)
    if server in FAMILY_SERVERS and (report.when == "call" or report.outcome != "passed"):
        name = item.nodeid.rpartition("::")[2].replace(f"[{server}]", "").replace(f"-{server}]", "]")
        item.config.stash[OUTCOMES].setdefault(server, {})[name] = report.outcome
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--support"):
        from sglang_mminfer.tools import machine

        file = Path(path)
        before = json.loads(file.read_text())["servers"] if file.exists() else {}
        servers = {**before, **session.config.stash[OUTCOMES]}
        file.write_text(json.dumps({**machine.describe(), "servers": servers}, indent=1) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    names = dict.fromkeys(name for item in session.items if (name := _server_of(item)))
    session.config.stash[ORDER] = [name for name in names if name not in AFTER_DRAFTS]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2_5_vl(tmp_path_factory.mktemp("model") / "tiny", **RECIPE)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    root = tmp_path_factory.mktemp("media")
    return Media(
        videos=(
            make_video(root / "a.mp4", 24, 112, 112, 8, seed=1),
            make_video(root / "b.mp4", 16, 140, 84, 8, seed=2),
            make_video(root / "c.mp4", 8, 84, 112, 4, seed=3),
        ),
        images=tuple(make_image(root / f"{i}.png", 56 + 28 * i, 84 + 28 * (i % 2), seed=i) for i in range(4)),
        medium_video=make_video(root / "medium.mp4", 16, 448, 448, 2, seed=5),
        long_video=make_video(root / "long.mp4", 128, 448, 448, 2, seed=4),
    )


@pytest.fixture(scope="session")
def sparse_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_config(tmp_path_factory.mktemp("config") / "sparse.json")


@pytest.fixture(scope="session")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the draft model of a server lies, under the server's name, before the server starts."""
    return tmp_path_factory.mktemp("drafts")


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest,
    model: Path,
    sparse_config: Path,
    drafts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Served]]:
    """A function that returns the server with a name in `NAMES`, and starts it if it is not running."""
    root = tmp_path_factory.mktemp("servers")

    def make(name: str) -> Served:
        folder = root / name
        folder.mkdir(exist_ok=True)
        if name in FAMILY_SERVERS:
            path, flags = family_server(name, folder)
        elif name in MIXED_SERVERS:
            path, flags = mixed_server(name, folder)
        elif name in DRAFTED_SERVERS:
            path, flags = drafted_server(name, folder)
        else:
            path, flags = model, FLAGS[name]
        flags = tuple({"{sparse}": str(sparse_config), "{draft}": str(drafts / name)}.get(flag, flag) for flag in flags)
        env = dict(ENVIRONMENT.get(name, RETRACTS if name in MIXED_SERVERS else {}))
        if name == PROBED:
            probed = folder / "probe.jsonl"
            probed.unlink(missing_ok=True)
            env |= {"PYTHONPATH": probe.install(folder / "probe"), probe.FILE: str(probed)}
        return serve(folder, path, flags, env)

    fleet = Fleet(make, request.config.stash[ORDER])
    try:
        yield fleet.get
    finally:
        fleet.stop()


@pytest.fixture
def served(servers: Callable[[str], Served], name: str) -> Served:
    """The server that the parameter `name` names, with an empty cache."""
    found = servers(name)
    found.server.flush_cache()
    return found


@pytest.fixture
def main(servers: Callable[[str], Served]) -> Served:
    """The server of most tests, with an empty cache."""
    found = servers("main")
    found.server.flush_cache()
    return found


@pytest.fixture(scope="session")
def references(servers: Callable[[str], Served], media: Media) -> References:
    """Answers of the sparse config to prompts that were computed alone, in one chunk, with nothing cached."""
    one_shot, others = servers("one_shot"), (20, 21, 22, 24, 26, 31, 32)

    def answered(prompts: list[list[Message]], label: str) -> Dialogue:
        return [(prompt, one_shot.ask(prompt, rid=f"{label}-{i}")) for i, prompt in enumerate(prompts)]

    return References(
        turns=answered(scripted(media.six_turns()), "reference-turn"),
        branches=answered([scripted(media.six_turns(), seed)[3] for seed in (1, 2)], "reference-branch"),
        others=answered([scripted(media.conversation(seed, 3), seed)[-1] for seed in others], "reference-other"),
        medium=answered([[user(video(media.medium_video), text("Where did it go?"))]], "reference-medium")[0],
    )

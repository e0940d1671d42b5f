"""The command line as a newcomer meets it: help, wrong words, exit statuses, old names, and what all that costs."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from sglang_mminfer import cli
from sglang_mminfer.commands import compare, options, parsing

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "needle_vlm" / "video"

HEAVY = ("sglang", "torch", "transformers", "numpy", "rich", "matplotlib", "openai", "httpx", "triton", "numba")

FINDINGS = {
    1: "test_the_quick_doctor_leaves_sglang_out",
    **dict.fromkeys((2, 3, 7, 8, 9, 11, 13, 14), "test_words_are_answered_within_a_second_and_without_heavy_modules"),
    **dict.fromkeys((4, 5), "test_one_form_of_errors_and_one_table_of_statuses"),
    6: "test_an_option_has_one_name_and_one_meaning",
    10: "test_a_server_that_is_not_there_is_named_as_it_was_typed",
    12: "test_help_has_defaults_and_sections",
    **dict.fromkeys((15, 22), "test_python_m_and_completion"),
    16: "test_the_version_names_what_it_runs_with",
    17: "test_a_server_with_mminfer_tells_its_density",
    18: "test_the_configs_of_the_wheel_can_be_checked",
    19: "test_the_doctor_says_which_check_runs",
    20: "test_the_death_of_a_server_is_no_progress",
    21: "test_env_tells_what_is_set",
    23: "test_chat_looks_for_files_before_it_looks_for_a_server",
}
"""What a newcomer stumbled over, and the test that holds each:

1 help that does not show the server's flags; 2 a model that is not there, told after a minute; 3 errors on standard
output; 4 a status for the same fault that differs from command to command; 5 four forms of errors; 6 four names for one
thing; 7 an error that names an option which the command does not have; 8 a trace that is not there; 9 a path called the
name of a repository; 10 a URL that nobody typed; 11 help that takes seconds; 12 help without defaults; 13 no help
without a command; 14 no "did you mean"; 15 no `python -m`; 16 a version without those of SGLang and torch; 17 JSON from
the doctor only; 18 a minute for the check of a file; 19 a minute without a word; 20 a server's death shown as progress;
21 variables that no help lists; 22 no completion; 23 a missing file, told when a server is there.
"""

CPU_SECONDS = 1.0
"""What the words of a command may cost, from the start of Python to the answer."""

QUICK: dict[str, tuple[str, int]] = {
    **{f"{name} --help": ("Usage: mminfer", 0) for name in cli.COMMANDS},
    "--help": ("Exit status:", 0),
    "--version": ("sglang 0.", 0),
    "env": ("SGLANG_MMINFER_CONFIG", 0),
    "config list": ("baseline_a_shape", 0),
    # findings 2, 3, 7 to 10, 13 and 14 of the newcomer's walk
    "": ("Commands:", 2),
    "doctro": ("Did you mean 'doctor'?", 2),
    "niah": ("mminfer niah: error: name running servers with --url, or a model to serve with --model-path", 2),
    "niah --lenghts 4096": ("mminfer niah: error: no such option: --lenghts. Did you mean --lengths?", 2),
    "niah --model-path /nonexistent": ("mminfer niah: error: --model-path: /nonexistent: no such folder", 2),
    "niah --url http://127.0.0.1:1": ("--url http://127.0.0.1:1: no server there; start one with `sglang serve`", 1),
    "niah --url http://127.0.0.1:1 --depths many": ("--depths: expected a valid integer", 2),
    "compare --model-path /nonexistent": ("mminfer compare: error: --model-path: /nonexistent: no such folder", 2),
    "compare --model-path m --configs nope": ('--mminfer-config: head config "nope": no built-in config has', 2),
    "chat --url localhost": ("mminfer chat: error: --url: expected something like http://127.0.0.1:30000", 2),
    "chat --url http://x --model-path m": ("--url, or a model to serve with --model-path; one of the two", 2),
    "chat --server-flags '--tp-size 2'": ("are for a server that is started: give --model-path, too", 2),
    "chat --auth-file nope": ("--auth-file: nope: no such file", 2),
    "compare": ("Missing option '--model-path'", 2),
    "inspect --trace /nonexistent": ("--trace: /nonexistent: no such file. A server that was started with", 2),
    "inspect --model-path m": ("nothing to look at: give --video, --image or --messages", 2),
    "search /nonexistent --video README.md": ("MODEL: /nonexistent: no such folder", 2),
    "search --model-path tests": ("--model-path: tests: no model, there is no config.json in this folder", 2),
    "search --model-path m --video nope.mp4": ("mminfer search: error: --video: nope.mp4: no such file", 2),
    "basis --model-path m --out x.npz": ("--out: expected a name that ends in .basis.npz, got x.npz", 2),
    "doctor --model-path ./nowhere": ("mminfer doctor: error: --model-path: ./nowhere: no such folder", 2),
    "doctor --video nope.mp4": ("--video: nope.mp4: no such file", 2),
    "doctor --time": ("mminfer doctor: error: --time needs --video: it measures how long a video takes", 2),
    "config check nope.json": ("NAME|PATH: nope.json: no such file", 2),
    "config chekc default": ("Did you mean 'check'?", 2),
}
"""Words, what is said, and the exit status."""


def test_words_are_answered_within_a_second_and_without_heavy_modules() -> None:
    """In processes of their own, all by one program that says what was imported and what it cost."""
    program = (
        "import sys, time\nfrom sglang_mminfer import cli\nstatus = cli.main(sys.argv[1:])\n"
        f"print([m for m in {HEAVY} if m in sys.modules], status, time.process_time(), file=sys.__stderr__)"
    )
    for words, (text, status) in QUICK.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program, *shlex.split(words)], capture_output=True, text=True, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        *said, last = [line for line in done.stderr.splitlines() if not line.startswith("sys:1: ")]
        loaded, code, _ = last.rsplit(" ", 2)
        stream = done.stdout if status == 0 else "\n".join(said)
        assert (loaded, int(code)) == ("[]", status), (words, done.stderr)
        assert text in " ".join(stream.split()), (words, stream)
        assert status == 0 or not done.stdout, words
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS, words


def test_the_version_names_what_it_runs_with(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import metadata

    assert cli.main(["--version"]) == 0
    said = capsys.readouterr().out
    for name in ("sglang", "torch", "transformers"):
        assert f"{name} {metadata.version(name)}" in said
    assert said.startswith("mminfer 0.") and f"Python {sys.version.split()[0]}" in said


def test_every_finding_has_a_test() -> None:
    assert list(FINDINGS) and set(FINDINGS) == set(range(1, 24))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for number, name in FINDINGS.items():
        assert f"\ndef {name}(" in tests, number


def test_help_has_defaults_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["niah", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Servers:", "Questions:", "[default: 4096, 8192;", "[default: 1800", "[env var: OPENAI_API_KEY]"):
        assert words in text
    assert cli.main(["inspect", "--help"]) == 0
    assert "--out DIR folder for inspect.html and its pictures [default: inspect-out]" in " ".join(
        capsys.readouterr().out.split()
    )


def all_commands() -> dict[str, typer.core.TyperCommand]:
    found = {}
    for name, command in typer.main.get_command(cli.app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": inner[sub] for sub in inner} if inner else {name: command}
    return found


def test_an_option_has_one_name_and_one_meaning() -> None:
    """A model, head configs, flags of servers and JSON are asked for by the same names, and all have help."""
    for name, command in all_commands().items():
        offered = {option for parameter in command.params for option in parameter.opts}
        assert not offered & {*parsing.OLD_NAMES, parsing.OLD_REST, "--model_path"}, name
        assert "--json" in offered, name
        for parameter in command.params:
            assert parameter.hidden or parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(
    "old, today, attribute, value",
    [
        ("niah --model-path m --config dense --config default", "--mminfer-config", "mminfer_config", "dense default"),
        ("niah --model-path m --config=dense", "--mminfer-config", "mminfer_config", "dense"),
        ("compare --model-path m --configs dense a_shape", "--mminfer-config", "mminfer_config", "dense a_shape"),
        ("search m --video README.md --server-args --tp-size 2 -x 'a b'", "--server-flags", "server_flags",
         "--tp-size 2 -x 'a b'"),
        ("basis --model-path m --server-args", "--server-flags", "server_flags", ""),
    ],
)  # fmt: skip
def test_old_names_are_taken_and_told(
    old: str, today: str, attribute: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command, *words = shlex.split(old)
    read: list[SimpleNamespace] = []
    module = {"niah": "niah.command", "search": "search.command", "basis": "basis.command"}.get(command, command)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(f"sglang_mminfer.tools.{module}.run", lambda options: read.append(options) or 0)
    assert cli.main([command, *words]) == 0
    found = getattr(read[0], attribute)
    assert (found if isinstance(found, str) else " ".join(found)) == value and read[0].model_path == "m"
    assert f"is now {today}" in capsys.readouterr().err


def test_an_option_may_take_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[SimpleNamespace] = []
    monkeypatch.setattr("sglang_mminfer.tools.inspect.command.run", lambda options: read.append(options) or 0)
    assert cli.main(["inspect", "--model-path", "m", "--image", "http://x/y.png", "--heads", "0:1", "2:3"]) == 0
    assert read[0].heads == [(0, 1), (2, 3)] and read[0].image == ["http://x/y.png"]


def test_bounds_and_names_are_those_of_the_tools() -> None:
    from sglang_mminfer.commands import basis
    from sglang_mminfer.head_config import HeadConfig
    from sglang_mminfer.head_config.basis_file import ENDING
    from sglang_mminfer.tools import baselines
    from sglang_mminfer.tools.needles.placed import MAX_DEPTHS, SHORTEST

    assert (options.MAX_DEPTHS, options.SHORTEST) == (MAX_DEPTHS, SHORTEST)
    assert compare.BASELINES == baselines.NAMES and basis.ENDING == ENDING
    assert options.built_in_configs() == HeadConfig.available()


@pytest.mark.parametrize(
    "error, status, said",
    [
        (parsing.Failed("no such luck"), 1, "mminfer env: error: no such luck"),
        (parsing.Refused("not so"), 2, "mminfer env: error: not so"),
        (FileNotFoundError(2, "No such file", "x"), 1, "mminfer env: error: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 130, "mminfer env: interrupted; every server that the command started is stopped"),
        (KeyboardInterrupt("go on"), 130, "mminfer env: interrupted; go on"),
    ],
)
def test_one_form_of_errors_and_one_table_of_statuses(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(json: options.AsJson = False) -> int:
        """Fail."""
        raise error

    app = parsing.new_app(help="x")
    app.command("env", cls=parsing.Command)(work)
    app.command("other", cls=parsing.Command)(work)
    assert parsing.run(app, "mminfer", ["env"]) == status and status in parsing.EXIT_STATUSES
    assert capsys.readouterr() == ("", f"{said}\n")


def test_python_m_and_completion(tmp_path: Path) -> None:
    """`python -m`, the script that shells take, and the words that it is given."""
    run = [sys.executable, "-m", "sglang_mminfer"]
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "SHELL": "/bin/bash",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    shown = subprocess.run([*run, "--show-completion", "bash"], capture_output=True, text=True, env=env)
    assert shown.returncode == 0 and "_MMINFER_COMPLETE=complete_bash" in shown.stdout
    done = subprocess.run([*run, "--install-completion", "bash"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and list(tmp_path.rglob("mminfer.sh")), done.stderr
    words = {"_MMINFER_COMPLETE": "complete_bash", "COMP_WORDS": "mminfer niah --mm", "COMP_CWORD": "2"}
    offered = subprocess.run(run, capture_output=True, text=True, env={**env, **words})
    assert offered.stdout.split() == ["--mminfer-config"]


def test_the_configs_of_the_wheel_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in options.built_in_configs():
        assert cli.main(["config", "check", name]) == 0
    assert cli.main(["config", "check", "default", "--model-path", str(MODEL), "--json"]) == 0
    assert "A server takes it." in (said := capsys.readouterr().out) and '"ok": true' in said
    assert cli.main(["config", "show", "baseline_a_shape", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["heads"]["all"]["pattern"]["kind"] == "a_shape"
    assert cli.main(["config", "show", "default"]) == 0
    assert "   all  " in capsys.readouterr().out
    (broken := tmp_path / "mine.json").write_text('{"heads": {"all": {"pattern": {"kind": "gird"}}}}')
    assert cli.main(["config", "check", str(broken)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"mminfer config check: error: {broken}: ") and not said.out


def test_env_tells_what_is_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_mminfer import settings

    monkeypatch.setenv(settings.CONFIG.variable, "dense")
    assert cli.main(["env", "--json"]) == 0
    rows = {row["variable"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[settings.CONFIG.variable]["value"] == "dense"
    assert set(rows) == {setting.variable for setting in settings.SETTINGS if not setting.internal}
    assert cli.main(["env"]) == 0
    assert f"{settings.CONFIG.variable}=dense, or --mminfer-config" in capsys.readouterr().out


def test_documents_have_the_exit_statuses_and_the_old_names() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for status, meaning in parsing.EXIT_STATUSES.items():
        assert f"| {status} | {meaning} |" in page
    for name in (*parsing.OLD_NAMES, parsing.OLD_REST):
        assert f"`{name}`" in page or f"`{name} " in page


def test_the_death_of_a_server_is_no_progress(tmp_path: Path) -> None:
    """SGLang's last words, as it wrote them into a log, stand behind the last step of the start."""
    from sglang_mminfer.tools.server import Server

    (log := tmp_path / "log").write_text(
        "[2026-11-25 10:00:00] Load weight begin.\n"
        "[2026-11-25 10:00:01] Scheduler hit an exception: Traceback (most recent call last):\n"
        "[2026-11-25 10:00:02] kill_process_tree called: parent_pid=7\n"
        "[2026-11-25 10:00:02] Received sigquit from a child process. It usually means the child failed.\n"
    )
    assert Server("model", log=log).last_line() == "Load weight begin."


def test_the_quick_doctor_leaves_sglang_out() -> None:
    """Versions and settings, in a process of its own."""
    program = (
        "import sys\nfrom sglang_mminfer import cli\nstatus = cli.main(['doctor', '--quick', '--json'])\n"
        "print([m for m in ('sglang', 'torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert {finding["section"] for finding in found["findings"]} == {"installed", "settings"}
    assert any("sglang.launch_server --help" in finding["text"] for finding in found["findings"])
    assert "[]" in done.stderr.splitlines(), done.stderr

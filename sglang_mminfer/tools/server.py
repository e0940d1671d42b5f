"""A real SGLang server in a process of its own, started as a user would start it, and certain to end.

    with Server(path, "--attention-backend", "mminfer", progress=print_wait) as server:
        server.client().chat.completions.create(model=server.model, messages=[...])

The server leads a process group of its own. The group ends with the block, whatever ends the block: Ctrl-C, an
exception, the end of the interpreter, or the sudden death of this process, for which a small watcher waits.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from sglang_mminfer import settings
from sglang_mminfer.tools import connections
from sglang_mminfer.tools.errors import Failed

Progress = Callable[[float, str], None]
"""Called while the server starts, with the seconds since its start and the last line of its log."""

QUIET_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
"""The environment of every server. To serve a model by its hub name, override the first two."""

# The watcher kills a process group as soon as the watcher's standard input closes: when this process dies.
WATCHER = 'read _; kill -s KILL -- "-$0" 2>/dev/null'

# Log lines that say nothing about the progress of the start: a server that dies, say, is not getting on.
_NOISE = re.compile(r"GET /health|deprecat|warn|kill_process_tree|sigquit|exception|error", re.IGNORECASE)
_STAMP = re.compile(r"^\[20\d\d-\d\d-\d\d [\d:]+[^\]]*\] (?:INFO: *)?")
_PORT_TAKEN = re.compile(r"^.*ERROR.*address already in use", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class ServerError(Failed):
    """The server died or did not answer in time. The message ends with the tail of the server's log."""


class Server:
    """One server; `start()` or the `with` block starts it.

    Args:
        model_path: the folder of a checkpoint, or a hub name.
        *flags: further command-line flags. Model, host and port are added, and `--device cpu` if there is no
            accelerator and the flags name no device, because SGLang takes a CPU only if it is told to.
        serve: start with `sglang serve` instead of `python -m sglang.launch_server`.
        log: the file for the server's output; by default a temporary file, `log_path`.
        env: environment variables to add; the value None removes a variable.
        timeout: how many seconds the server has to become healthy.
        progress: called about twice a second while the server starts.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *flags: str,
        serve: bool = False,
        host: str = "127.0.0.1",
        port: int | None = None,
        log: str | os.PathLike[str] | None = None,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 600.0,
        progress: Progress | None = None,
    ) -> None:
        self.model = os.fspath(model_path)
        self.host = host
        self.port = port or free_port(host)
        self.timeout = timeout
        self.progress = progress
        self.start_seconds: float | None = None
        """How many seconds the start took; None before its end."""
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._env = dict(env or {})
        if log is None:
            handle, name = tempfile.mkstemp(prefix="sglang-", suffix=".log")
            os.close(handle)
            log = name
        self.log_path = Path(log)
        program = [str(Path(sys.executable).parent / "sglang"), "serve"]
        if not serve:
            program = [sys.executable, "-m", "sglang.launch_server"]
        address = ["--host", host, "--port", str(self.port)]
        self.command = [*program, "--model-path", self.model, *address, *_device(flags), *map(str, flags)]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The id of the server's first process, and of the process group that its children belong to."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> Server:
        """Start the server and wait until it is healthy.

        Raises:
            ServerError: the server died or was not healthy in time; the message ends with the tail of its log.
        """
        if self._process is not None:
            raise ServerError(f"the server at {self.url} was started before; make another one")
        begin = time.monotonic()
        try:
            self._spawn()
            while not self.healthy():
                seconds = time.monotonic() - begin
                if not self.running:
                    code = self._process.returncode if self._process else None
                    raise ServerError(self._failure(f"died with exit status {code} after {seconds:.0f} s"))
                if _PORT_TAKEN.search(self.tail(10)):  # SGLang stays alive after this, but does not answer
                    raise ServerError(self._failure(f"could not listen on port {self.port}: it is in use"))
                if seconds > self.timeout:
                    raise ServerError(self._failure(f"was not healthy within {self.timeout:.0f} s"))
                if self.progress is not None:
                    self.progress(seconds, self.last_line())
                time.sleep(0.4)
        except BaseException:  # Ctrl-C included
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin
        return self

    def stop(self, grace: float = 0.0) -> None:
        """End the server and all processes that it started. May be called any number of times.

        Args:
            grace: how many seconds the server gets to finish its requests and end by itself. The default is 0,
                because SGLang looks only every five seconds whether it should end, and our servers have nothing to
                lose.
        """
        process, self._process = self._process, None
        watcher, self._watcher = self._watcher, None
        atexit.unregister(self.stop)
        if process is None:
            return
        try:
            if grace > 0 and process.poll() is None:
                process.terminate()  # only the leader: it would take the sudden end of its children for a crash
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        finally:  # Ctrl-C during the wait comes here at once
            # Children can outlive their leader, so the group is killed even if the leader is gone.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            while _group_alive(process.pid):  # until the kernel has freed their memory and ports
                time.sleep(0.01)
            if watcher is not None:
                watcher.kill()
                watcher.wait()
                if watcher.stdin is not None:
                    watcher.stdin.close()

    def client(self, timeout: float = 600.0) -> Any:
        """The official OpenAI client of this server. It asks everything once."""
        return connections.openai_client(self.url, timeout)

    def get_info(self) -> dict[str, Any]:
        """The server's arguments and state, as it reports them."""
        return json.loads(self._request("/server_info"))

    def flush_cache(self, timeout: float = 30.0) -> None:
        """Empty the radix cache. Waits until the server is idle, because a busy server refuses.

        Raises:
            ServerError: the server still refuses after `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                self._request("/flush_cache", method="POST")
                return
            except httpx.HTTPStatusError as error:
                if time.monotonic() > until:
                    raise ServerError(self._failure(f"did not flush its cache: {error}")) from error
            time.sleep(0.1)

    def log(self) -> str:
        """All output of the server so far."""
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def last_line(self) -> str:
        """The last line of the log that tells of the server's progress, without its time stamp."""
        for line in reversed(self.tail(200).splitlines()):
            stamp = _STAMP.match(line := _COLOUR.sub("", line))
            if stamp and not _NOISE.search(line):
                return line[stamp.end() :].strip()
        return "loading SGLang" if self.running else ""

    def _spawn(self) -> None:
        # Our settings in the caller's environment are meant for another server; this one must not inherit them.
        our_variables = {setting.variable for setting in settings.SETTINGS}
        environment = {k: v for k, v in os.environ.items() if k not in our_variables} | QUIET_ENVIRONMENT
        for name, value in self._env.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        atexit.register(self.stop)
        with contextlib.suppress(FileNotFoundError):  # a machine without sh gets no watcher
            self._watcher = subprocess.Popen(
                ["sh", "-c", WATCHER, str(self._process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            self._request("/health", timeout=5.0)
        except httpx.HTTPError:
            return False
        return True

    def _request(self, path: str, method: str = "GET", timeout: float = 60.0) -> bytes:
        # No proxy, because the server is on this machine.
        return httpx.request(method, self.url + path, timeout=timeout, trust_env=False).raise_for_status().content

    def _failure(self, event: str) -> str:
        return (
            f"the server {event}.\n  command: {' '.join(self.command)}\n  log: {self.log_path}, which ends with:\n"
            + "\n".join(f"  | {line}" for line in self.tail().splitlines())
        )


def _device(flags: Sequence[str]) -> list[str]:
    from sglang_mminfer.serving import cpu_platform

    named = any(flag.split("=")[0] == "--device" for flag in flags)
    return [] if named or cpu_platform.accelerators() else ["--device", "cpu"]


def _group_alive(leader: int) -> bool:
    """Whether a process of this group still holds memory or ports."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            is_dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            if os.getpgid(process.pid) == leader and not is_dead:
                return True
    return False


def free_port(host: str) -> int:
    """A free port, below the range from which systems take ports for outgoing connections.

    SGLang binds the port only when the model is loaded. By then a port of that range could belong to some client.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ServerError(f"no free port found on {host} between 20000 and 30000")


@contextlib.contextmanager
def shown_wait(label: str, stream: Any = None) -> Iterator[Progress]:
    """A progress callback that keeps one line up to date: label, seconds, last line of the log.

    On a stream that is no terminal it prints a line every ten seconds.
    """
    out = stream if stream is not None else sys.stderr
    is_terminal = out.isatty()
    last_seconds = -10.0

    def show(seconds: float, line: str) -> None:
        nonlocal last_seconds
        if is_terminal:
            print(f"\r\x1b[K{label} {seconds:4.0f} s  {line[:90]}", end="", file=out, flush=True)
        elif seconds - last_seconds >= 10:
            last_seconds = seconds
            print(f"{label} {seconds:4.0f} s  {line[:90]}", file=out, flush=True)

    try:
        yield show
    finally:
        if is_terminal:
            print("\r\x1b[K", end="", file=out, flush=True)

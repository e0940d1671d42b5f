"""Whatever a client sends is answered or refused in time, and no other request notices.

`make fuzz` sends `SHARE` of as many cases as MMINFER_FUZZ says; its variables are those of tests/fuzz/test_fuzz.py.
`make test` sends a few, always the same.
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as from_seed
from hypothesis import strategies as st

from payloads import chat_bodies, generate_bodies
from run_record import RunRecord, command
from serving import Media, Message, OracleAnswer, Served, image, same, text, user, video

SECONDS = 30
"""The longest time until a payload is answered."""

FEW = 60
SHARE, BATCH = 0.05, 200
EVERY = 25
"""After this many payloads a known conversation is asked again."""

ALLOWED: dict[str, str] = {}
"""By text: SGLang's answers with status 500 that have nothing to do with media or mminfer, and their cause."""


class Client:
    """Sends payloads, and checks that a known conversation still gets the same answer."""

    def __init__(self, main: Served, media: Media) -> None:
        self.main = main
        film, picture = str(media.videos[2]), str(media.images[0])
        self.bodies = st.one_of(
            generate_bodies(picture, film, [self._session()]).map(lambda body: ("/generate", body)),
            chat_bodies(picture, film).map(lambda body: ("/v1/chat/completions", body)),
        )
        self.known: list[Message] = [
            user(video(media.videos[1]), image(media.images[1]), text("And now? " + "stone river " * 60))
        ]
        self.before: OracleAnswer = main.ask(self.known)
        self.sent = 0
        self.statuses: collections.Counter[int] = collections.Counter()
        self.allowed: collections.Counter[str] = collections.Counter()

    def _session(self) -> str:
        status, raw = self._post("/open_session", {"capacity_of_str_len": 10_000})
        assert status == 200, raw
        session = json.loads(raw)
        sampling = {"max_new_tokens": 2, "temperature": 0}
        parent = {"text": "Hello", "rid": "fuzz-parent", "session_params": {"id": session}, "sampling_params": sampling}
        assert self._post("/generate", parent)[0] == 200
        return session

    def _post(self, path: str, body: Any) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.main.server.host, self.main.server.port, timeout=SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def send(self, path: str, body: dict[str, Any]) -> None:
        begin = time.monotonic()
        try:
            status, said = self._post(path, body)
        except (OSError, http.client.HTTPException) as error:
            seconds = time.monotonic() - begin
            pytest.fail(f"{path} {json.dumps(body)[:3000]}: no answer after {seconds:.0f} s: {error!r}", pytrace=False)
        self.sent += 1
        self.statuses[status] += 1
        reason = next((name for name in ALLOWED if re.search(name, said)), None) if status >= 500 else None
        if reason is not None:
            self.allowed[reason] += 1
        assert status < 500 or reason, f"{path} {json.dumps(body)[:3000]}: {status} {said[:600]}"
        if self.sent % EVERY == 0:
            self.ask_again()

    def ask_again(self) -> None:
        if self.sent % (4 * EVERY) == 0:
            self.main.server.flush_cache()
        same(self.before, self.main.ask(self.known))


def fuzz(client: Client, examples: int, seed: int) -> None:
    @from_seed(seed)
    @settings(
        max_examples=examples,
        derandomize=False,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(client.bodies)
    def send(payload: tuple[str, dict[str, Any]]) -> None:
        client.send(*payload)

    send()
    client.ask_again()


@pytest.mark.server("main")
def test_a_few_payloads(main: Served, media: Media) -> None:
    client = Client(main, media)
    fuzz(client, FEW, 0)
    assert client.statuses[200] >= FEW // 10 and client.statuses[400] >= FEW // 10, client.statuses


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.server("main")
def test_many_payloads(main: Served, media: Media) -> None:
    seed, cases = int(os.environ.get("MMINFER_FUZZ_SEED") or 0), int(os.environ.get("MMINFER_FUZZ") or 100_000)
    until = time.monotonic() + 60 * float(os.environ.get("MMINFER_FUZZ_MINUTES") or "inf")
    path = Path(os.environ.get("MMINFER_FUZZ_RECORD") or "build/fuzz.json")
    record = RunRecord(path, seed, command("make fuzz", "MMINFER_FUZZ"))
    for batch in record.missing("payloads", round(SHARE * cases / BATCH)):
        if time.monotonic() > until:
            break
        client = Client(main, media)
        try:
            fuzz(client, BATCH, seed * 1_000_003 + batch)
        except BaseException as error:
            record.fault(str(error)[:4000], kind="payloads", batch=batch)
            record.save()
            raise
        record.add("payloads", {"cases": client.sent, **{str(one): n for one, n in client.statuses.items()}})
        record.ran("payloads", batch)
        record.save()
        print(f"{record.part('payloads')['cases']} payloads: {dict(client.statuses)}", flush=True)

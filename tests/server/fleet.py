"""The servers of a test run: each starts once, while the tests of the server before it run; few run at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from serving import Served
from sglang_mminfer.tools.server import Server

ALIVE = 2
"""How many servers that tests asked for may run, besides the one that starts. Each takes about 3 GB, most of it
libraries."""


class Fleet:
    """Servers by name.

    A start is a minute of imports, and for half of it a core is idle. So the server that is needed next starts in the
    background.

    Args:
        make: makes the server with a name, not started.
        order: names in the order in which tests need them.
    """

    def __init__(self, make: Callable[[str], Served], order: Sequence[str]) -> None:
        self._make = make
        self._order = list(order)
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._servers: dict[str, tuple[Served, Future[Server]]] = {}
        self._starter = ThreadPoolExecutor(2)

    def get(self, name: str) -> Served:
        """The server with this name, started and healthy."""
        self._asked[name] = None
        self._asked.move_to_end(name)
        while len(self._asked) > ALIVE:
            self._stop(next(iter(self._asked)))
        served, started = self._begin(name)
        self._prepare_after(name)
        started.result()
        return served

    def stop(self) -> None:
        """Ends all servers."""
        self._starter.shutdown(wait=False, cancel_futures=True)
        for name in list(self._servers):
            self._stop(name)

    def _begin(self, name: str) -> tuple[Served, Future[Server]]:
        if name not in self._servers:
            served = self._make(name)
            self._servers[name] = served, self._starter.submit(served.server.start)
        return self._servers[name]

    def _prepare_after(self, name: str) -> None:
        """Starts the server that tests need next, unless a server that nobody asked for yet already runs."""
        if name not in self._order or any(other not in self._asked for other in self._servers):
            return
        after = self._order[self._order.index(name) + 1 :]
        if after and after[0] not in self._servers:
            self._begin(after[0])

    def _stop(self, name: str) -> None:
        self._asked.pop(name, None)
        served, started = self._servers.pop(name)
        served.server.stop()
        wait([started])  # a pending start ends with an error, unless its process appears only now
        served.server.stop()

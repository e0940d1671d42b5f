"""What a tool raises to end its command in one sentence. The command line prints it and picks the exit status."""

from __future__ import annotations


class Failed(RuntimeError):
    """The command cannot go on; the message says why and what to do."""

    exit_code = 1


class Refused(Failed):
    """The command cannot do what its words ask, whatever else happens; the message tells the user why."""

    exit_code = 2

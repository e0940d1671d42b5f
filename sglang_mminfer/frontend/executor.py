"""How programs of our backends run: with media in any turn, and with errors where the user looks.

SGLang makes a `StreamExecutor` and a `ProgramState` for every program and fork, and no backend is asked which. So the
two classes get a `__new__` that makes the classes below for our backends. Programs of other backends are made as
before. `PATCHES` lists both.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from sglang.lang.interpreter import ProgramState, StreamExecutor

from sglang_mminfer.frontend.backend import MediaBackend
from sglang_mminfer.frontend.media import Kind, MediaError


class MediaExecutor(StreamExecutor):
    """Runs the expressions of one program in a thread, as its base does.

    Attributes:
        images_: the media of the text, in their order.
    """

    error_: Exception | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._ended = False
        self._failed: set[str] = set()
        self._forks: list[StreamExecutor] = []
        super().__init__(*args, **kwargs)  # starts the thread

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> list[StreamExecutor]:
        """Executors that go on from here. A prefix is prefilled once before they start.

        SGLang looks whether there is a prefix before its thread has written it.
        """
        self.sync()
        forks = super().fork(size, position_ids_offset)
        self._forks += forks
        return forks

    def submit(self, expr: Any) -> None:
        """Execute an expression after those before it.

        Raises:
            MediaError: the program has ended. SGLang takes the expression, and who waits for it waits forever.
        """
        if self._ended:
            raise MediaError("the program has ended: nothing can be added to it")
        super().submit(expr)

    def sync(self) -> None:
        """Wait until all that was submitted is done.

        Raises the program's error, unless the program has ended: then SGLang waits for many programs, and one that
        failed must not take the results of the others.
        """
        super().sync()
        if self.error_ is not None and not self._ended:
            raise self.error_

    def error(self) -> Exception | None:
        """The program's error, or None. SGLang's goes through `sync`."""
        super().sync()
        return self.error_

    def get_var(self, name: str) -> Any:
        """A variable. Raises the program's error if that came before the variable was complete."""
        if name in self.variable_event:
            self.variable_event[name].wait()
        self.raise_for(name)
        return self.variables[name]

    def get_meta_info(self, name: str, timeout: float | None = None) -> Any:
        """What is known of how a variable came about. Raises as `get_var`."""
        info = super().get_meta_info(name, timeout)
        self.raise_for(name)
        return info

    def raise_for(self, name: str | None) -> None:
        """Raise the program's error if a variable lacks because of it; with None, if there is one."""
        if self.error_ is not None and (name is None or name in self._failed or name not in self.variables):
            raise self.error_

    def end(self) -> None:
        """No expression follows.

        SGLang runs a program that streams in a thread, and calls this while an exception ends the program. Nobody but
        the streams can tell the user.

        Forks end, too: SGLang leaves those behind one that failed, and a process waits for their threads for ever.
        """
        failure, first_end, is_fork = sys.exc_info()[1], not self._ended, self.fork_start_text_pos is not None
        self._ended = True
        if isinstance(failure, Exception) and first_end and self.stream and self.use_thread and not is_fork:
            self.queue.put(failure)  # behind all that was submitted before it
        super().end()
        for fork in self._forks:
            fork.end()
        self._forks.clear()

    def _thread_worker_func(self) -> None:
        """Executes what is submitted. After an error it executes no more but takes all, because SGLang's thread ends,
        and who waits for a later expression waits forever."""
        while (expression := self.queue.get()) is not None:
            if self.error_ is None:
                try:
                    if isinstance(expression, Exception):
                        raise expression
                    self._execute(expression)
                except Exception as error:
                    warnings.warn(f"a program failed: {error}", stacklevel=2)
                    self.error_ = error
            if self.error_ is not None:
                self._give_up_variables()
            self.queue.task_done()
            if self.stream_text_event:
                self.stream_text_event.set()
        self.queue.task_done()
        self.is_finished = True
        if self.stream_text_event:
            self.stream_text_event.set()

    def _give_up_variables(self) -> None:
        """Wake who waits for a variable that will not come."""
        for name, event in list(self.variable_event.items()):
            if not event.is_set():
                self._failed.add(name)
                event.set()
        for event in list((self.stream_var_event or {}).values()):
            event.set()

    def _execute_image(self, expr: Any) -> None:
        self._add("image", expr.path)

    def _execute_video(self, expr: Any) -> None:
        self._add("video", expr.path, expr.num_frames)

    def _add(self, kind: Kind, source: Any, num_frames: int = -1) -> None:
        placeholder = self.chat_template.placeholder(kind)
        self.images_.append(self.backend.media.medium(kind, source, num_frames))
        self.text_ += placeholder


class MediaState(ProgramState):
    """A program's state whose streams raise where the program failed, and give all text to who asks late."""

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text, or a variable, in pieces as they come."""
        given = 0
        try:
            for piece in super().text_iter(var_name):
                given += len(piece)
                if piece:
                    yield piece
        except KeyError:
            pass  # the program failed before the variable had a first piece
        if rest := self._rest(var_name, given):
            yield rest

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """As `text_iter`, with `return_meta_data` as pairs of a piece and the meta information so far."""
        given = 0
        try:
            async for piece in super().text_async_iter(var_name, return_meta_data):
                given += len(piece[0] if return_meta_data and isinstance(piece, tuple) else piece)
                if piece:
                    yield piece
        except KeyError:
            pass
        if rest := self._rest(var_name, given):
            yield (rest, self.stream_executor.meta_info.get(var_name)) if return_meta_data else rest

    def _rest(self, var_name: str | None, given: int) -> str:
        """What SGLang's iterators left out: all of it if the program was over before, or the last piece."""
        executor = self.stream_executor
        executor.raise_for(var_name)
        return str(executor.text_ if var_name is None else executor.variables.get(var_name, ""))[given:]


@dataclass(frozen=True)
class Patch:
    """A place where SGLang's client is changed.

    Attributes:
        target: the class that gets a `__new__`.
        replacement: the class that it makes for a program of our backends.
        reason: why SGLang cannot do without it.
    """

    target: type
    replacement: type
    reason: str


PATCHES = (
    Patch(
        StreamExecutor,
        MediaExecutor,
        "It encodes a video with a package that SGLang does not install, writes every medium as an image, forks before "
        "the prefix is prefilled, and leaves who waits after an error with a KeyError or waiting forever.",
    ),
    Patch(
        ProgramState,
        MediaState,
        "Its streams end in silence where the program failed, and give nothing to who asks after the program's end.",
    ),
)
"""All that importing this package changes in SGLang; a server never imports it."""


def install() -> None:
    """Apply `PATCHES`; again changes nothing."""
    for patch in PATCHES:
        if "__new__" not in vars(patch.target):
            patch.target.__new__ = staticmethod(_maker(patch))  # type: ignore[method-assign]


def _maker(patch: Patch) -> Any:
    def make(kind: type, *args: Any, **kwargs: Any) -> Any:
        # An executor is given the backend, a state is given the executor.
        ours = kind is patch.target and any(
            isinstance(getattr(given, "backend", given), MediaBackend) for given in (*args, *kwargs.values())
        )
        return object.__new__(patch.replacement if ours else kind)

    return make

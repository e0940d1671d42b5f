"""An `sglang.Engine` in this process as the backend of SGLang frontend programs with media."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from sglang_mminfer.frontend.backend import MediaBackend, Refused
from sglang_mminfer.frontend.media import MediaError
from sglang_mminfer.frontend.template import served_template


class EngineEndpoint(MediaBackend):
    """A backend for programs with images and videos in every turn, without HTTP.

        engine = sgl.Engine(model_path=..., attention_backend="mminfer")
        sgl.set_default_backend(EngineEndpoint(engine))

    Programs, forks and batches run at the same time, as with a server. While one runs, `engine.generate` cannot be
    called beside it, because the engine has one event loop.

    Args:
        engine: an `sglang.Engine`. It is the caller's to shut down.

    Raises:
        MediaError: its chat template cannot be used.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        manager = engine.tokenizer_manager
        arguments = manager.server_args
        super().__init__(
            as_files=True,
            guessed=False,
            takes_num_frames="mminfer" in (arguments.attention_backend, arguments.prefill_attention_backend),
        )
        self.model_info = {"model_path": manager.model_path}
        self._lock = threading.Lock()
        self._users = 0
        self._thread: threading.Thread | None = None
        self.chat_template = served_template(manager.model_path, self._renderer())

    def send(self, data: dict[str, Any]) -> Any:
        """As `MediaBackend.send`."""
        answers = self._answers(data)
        if data.get("stream"):
            return answers
        with contextlib.closing(answers):
            return next(answers)

    def flush_cache(self) -> Any:
        """Empty the engine's radix cache."""
        with self._running_loop():
            return self._result(self.engine.tokenizer_manager.flush_cache())

    def get_server_info(self) -> Any:
        """The engine's arguments and state."""
        return self.engine.get_server_info()

    def _answers(self, data: dict[str, Any]) -> Generator[Any, None, None]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager = self.engine.tokenizer_manager
        single = isinstance(data.get("text"), str)
        # Not Engine.generate: it has no argument for the text of log-probabilities, which `select` reads.
        request = GenerateReqInput(**data, rid=uuid.uuid4().hex if single else None)
        with self._running_loop():
            answers = manager.generate_request(request, None)
            finished = False
            try:
                while True:
                    try:
                        answer = self._result(anext(answers))
                    except (StopAsyncIteration, ValueError) as end:
                        finished = True
                        if isinstance(end, ValueError):
                            raise Refused(str(end)) from None
                        return
                    finished = not data.get("stream")
                    yield answer
            finally:
                if not finished:  # nobody reads on
                    manager.abort_request(request.rid)
                self._result(answers.aclose())

    def _result(self, waiting: Any) -> Any:
        async def waited() -> Any:
            try:
                return True, await waiting
            except StopAsyncIteration:  # no future may hold one
                return False, None

        more, value = asyncio.run_coroutine_threadsafe(waited(), self.engine.loop).result()
        if not more:
            raise StopAsyncIteration
        return value

    @contextlib.contextmanager
    def _running_loop(self) -> Iterator[None]:
        """Run the engine's event loop in a thread while any program needs it, so that requests run side by side. At
        other times nobody runs it, as the engine's own methods expect."""
        with self._lock:
            if not self._users:
                if self.engine.loop.is_running():
                    raise MediaError("the engine's event loop is in use: run programs when no other call of it runs")
                self._thread = threading.Thread(target=self.engine.loop.run_forever, daemon=True)
                self._thread.start()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._thread is not None:
                    self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)
                    self._thread.join()

    def _renderer(self) -> Any:
        from sglang.srt.entrypoints.openai.protocol import TokenizeRequest
        from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize

        manager = self.engine.tokenizer_manager
        serving = OpenAIServingTokenize(manager, self.engine.template_manager)

        def rendered(chat: Sequence[dict[str, Any]], add_generation_prompt: bool | None) -> str:
            request = TokenizeRequest(messages=list(chat), add_generation_prompt=add_generation_prompt)
            try:
                tokens = serving._tokenize_chat_request(request)
            except ValueError as error:
                raise MediaError(str(error)) from None
            return manager.tokenizer.decode(tokens, skip_special_tokens=False)

        return rendered

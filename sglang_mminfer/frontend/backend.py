"""What a program's prompt becomes on its way to /generate, whether over HTTP or into an engine."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.global_config import global_config

from sglang_mminfer.frontend.media import Kind, MediaError, MediaStore, Medium
from sglang_mminfer.frontend.template import ServedTemplate

KINDS: tuple[Kind, ...] = ("image", "video")

_LOGPROB_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")

_ABOUT = re.compile(r"(IMAGE|VIDEO) data at index (\d+)")
"""How SGLang says which medium of a request it could not read."""

_NO_FRAMES = "num_frames: this model takes"
"""How a server with this plugin refuses a number of frames."""


class Refused(MediaError):
    """The server's own words on why it does not answer."""


class MediaBackend(RuntimeEndpoint):
    """A backend of SGLang's frontend whose programs hold any number of images and videos.

    SGLang's `RuntimeEndpoint` sends one image at most. `select` is its own; what it calls is replaced.

    Attributes:
        chat_template: the server's.
        media: the files of all programs.
    """

    chat_template: ServedTemplate

    def __init__(self, as_files: bool, guessed: bool, takes_num_frames: bool) -> None:
        """
        Args:
            as_files: the server reads local files itself, so their paths are sent instead of their content.
            guessed: nobody said so: where the server cannot read a file, its content is sent.
            takes_num_frames: the server lets a request say how many frames of a video to look at.
        """
        BaseBackend.__init__(self)  # RuntimeEndpoint's own looks the template up by the model's name
        self.support_concate_and_append = True
        self.media = MediaStore()
        self._as_files = as_files
        self._guessed = guessed
        self._takes_num_frames = takes_num_frames
        self._warned = False

    @abstractmethod
    def send(self, data: dict[str, Any]) -> Any:
        """Send a body of /generate.

        Returns:
            The answer, a list of answers for several prompts, or with `stream` a generator of answers.

        Raises:
            Refused: the server does; with `stream` perhaps only when the first answer is asked for.
            MediaError: it cannot be reached.
        """

    def ask(self, s: Any, data: dict[str, Any]) -> Any:
        """Send a prompt with the media of a program.

        Args:
            s: the program's executor.
            data: a body of /generate without media. "text" may be a list of prompts, which all get the media.

        Returns:
            As `send`.

        Raises:
            MediaError: naming the file or the limit in the way.
        """
        media: Sequence[Medium] = s.images_ if "text" in data else ()
        self._check_places(s.text_, media)
        as_files = self._as_files
        while True:
            with_frames = self._takes_num_frames
            try:
                answer = self.send(data | self._fields(media, as_files, data.get("text")))
                if data.get("stream"):  # a prompt that the server refuses is refused here
                    answer = _resumed(list(itertools.islice(answer, 1)), answer)
                if self._guessed:
                    self._as_files = as_files
                return answer
            except Refused as refused:
                message = str(refused)
            about = _medium_of(message, media)
            if _NO_FRAMES in message and with_frames:
                self._takes_num_frames = False
            elif as_files and self._guessed and about is not None and about.file is not None:
                as_files = False  # the server may be behind a tunnel, or may not look into this folder
            else:
                raise MediaError(f"{about.name}: {_without_url(message)}" if about else message)

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        """A program's `gen`: text and meta information, or a list of each if it wants several answers."""
        answer = self.ask(s, self._body(s, sampling_params))
        if isinstance(answer, list):
            return [one["text"] for one in answer], [one["meta_info"] for one in answer]
        return answer["text"], answer["meta_info"]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, Any]]:
        """A program's `gen` in pieces, each with the meta information so far."""
        if (sampling_params.n or 1) > 1:
            raise MediaError(f"a stream has one answer, and n={sampling_params.n} asks for more")
        given = 0
        with contextlib.closing(self.ask(s, {**self._body(s, sampling_params), "stream": True})) as answers:
            for answer in answers:
                piece = answer["text"][given:]
                given += len(piece)
                yield piece, answer["meta_info"]

    def cache_prefix(self, prefix_str: str) -> None:
        """Prefill what the programs of a batch begin with."""
        self.send({"text": prefix_str, "sampling_params": {"max_new_tokens": 0}})

    def commit_lazy_operations(self, s: Any) -> None:
        """Prefill a program's text, so that all that follows finds it in the cache."""
        self.ask(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    fill_image = commit_lazy_operations

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """What RuntimeEndpoint.select calls.

        It takes the first log-probability for that of the prompt's last token, which may merge with a choice, and drops
        it where it did not. But the first is of the token before, and None; so nothing is ever dropped, and a choice's
        mean holds a token of the prompt, which counts the more the shorter the choice is.
        """
        answer = self.ask(s, data)
        for one in answer if isinstance(answer, list) and "logprob_start_len" in data else ():
            logprobs = one["meta_info"]["input_token_logprobs"]
            one["meta_info"]["input_token_logprobs"] = logprobs[1:] if logprobs[0][0] is None else logprobs
        return answer

    def _body(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        self._handle_dtype_to_regex(sampling_params)
        body = {
            # A list, because SGLang deals media of a single prompt out to its answers.
            "text": [s.text_] if (sampling_params.n or 1) > 1 else s.text_,
            "sampling_params": {
                "skip_special_tokens": global_config.skip_special_tokens_in_output,
                "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
                **sampling_params.to_srt_kwargs(),
            },
        }
        values = ((name, getattr(sampling_params, name, None)) for name in _LOGPROB_FIELDS)
        return body | {name: value for name, value in values if value is not None}

    def _fields(self, media: Sequence[Medium], as_files: bool, text: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for kind in KINDS:
            if entries := [self._entry(medium, as_files) for medium in media if medium.kind == kind]:
                fields[f"{kind}_data"] = [entries] * len(text) if isinstance(text, list) else entries
        return fields

    def _entry(self, medium: Medium, as_files: bool) -> Any:
        url = medium.file.as_uri() if as_files and medium.file else self.media.data_url(medium)
        if medium.num_frames < 1:
            return url
        if self._takes_num_frames:
            return {"url": url, "num_frames": medium.num_frames}
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{medium.name}: num_frames={medium.num_frames} is left out: no request can tell this server how "
                "many frames to look at. Start the server with --mm-process-config, and write num_frames=-1.",
                stacklevel=2,
            )
        return url

    def _check_places(self, text: str, media: Sequence[Medium]) -> None:
        """Words of a program that look like a placeholder would take the place of its media."""
        places = self.chat_template.placeholders
        for place in {places[medium.kind].strip() for medium in media}:
            expected = sum(places[medium.kind].strip() == place for medium in media)
            if (found := text.count(place)) != expected:
                raise MediaError(
                    f"the text holds {place!r}, which stands for a medium, {found} times, and the program has "
                    f"{expected} of them: write these words differently"
                )


def _resumed(first: list[Any], answers: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """A stream whose first answer has been taken. Closing it closes the stream, and the server stops."""
    with contextlib.closing(answers):
        yield from first
        yield from answers


def _medium_of(message: str, media: Sequence[Medium]) -> Medium | None:
    """The medium that an error of the server is about."""
    if found := _ABOUT.search(message):
        of_kind = [medium for medium in media if medium.kind == found[1].lower()]
        if int(found[2]) < len(of_kind):
            return of_kind[int(found[2])]
    named = [medium for medium in media if medium.file is not None and medium.file.name in message]
    return named[0] if named else None


def _without_url(message: str) -> str:
    """An error of the server without the content of the file."""
    return re.sub(r"data:[\w/.+-]*;base64,[\w+/=]*(\.\.\.)?", "the file", message)

"""Talk about videos and images with a running SGLang server, and see what its radix cache saves.

    sglang serve --model-path Qwen/Qwen2.5-VL-7B-Instruct --attention-backend mminfer --enable-cache-report
    python video_chat.py --video film.mp4 --question "What happens?" --question "And then?"

Order counts: a video or image goes with the next question after it. Without --question the program asks for questions;
its commands are `/video FILE`, `/image FILE` and `/quit`. Files are read here and sent as data: URLs, so the server can
be on another machine; http(s) URLs are passed on as they are. The program needs `openai`, and `decord` and `pillow` to
look at files before they are sent.
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai


class BadInput(Exception):
    """An error that the user can correct; the message says what is wrong."""


def media_part(kind: str, source: str) -> dict[str, Any]:
    """The part of a message for one video or image. Prints the size of a file.

    Raises:
        BadInput: the file cannot be read, or is no video (no image).
    """
    url = source
    if not is_url(source):
        path = Path(source).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{source}: cannot be read: {error.strerror}") from None
        about = describe_video(path) if kind == "video" else describe_image(path)
        print(f"[{path.name}: {about}, {len(content) / 1e6:.1f} MB]")
        mime = mimetypes.guess_type(path.name)[0] or ("video/mp4" if kind == "video" else "image/png")
        url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def is_url(source: str) -> bool:
    """Whether a video or image is named by a URL, and not a file here."""
    return source.startswith(("http://", "https://", "data:"))


def describe_video(path: Path) -> str:
    """Frames, seconds and size of a video, in words."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path))
        frames, fps = len(reader), reader.get_avg_fps()
        height, width, _ = reader[0].shape
    except Exception:  # decord has its own error types, also for a picture or a text
        raise BadInput(f"{path}: not a video that FFmpeg can decode") from None
    return f"{frames} frames, {frames / fps:.1f} s, {width} x {height}"


def describe_image(path: Path) -> str:
    """The size of an image, in words."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
            return f"{image.width} x {image.height}"
    except Exception:
        raise BadInput(f"{path}: not an image that can be read") from None


def ask(client: openai.OpenAI, model: str, messages: list[Any], max_tokens: int) -> str:
    """Ask for one turn. Prints the answer as it comes, then the cost of the prompt. Returns the answer."""
    answer, first, usage = "", None, None
    begin = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            if piece := choice.delta.content:
                first = first or time.perf_counter() - begin
                answer += piece
                print(piece, end="", flush=True)
    print()
    if usage is not None:
        details = usage.prompt_tokens_details
        cached = f"{details.cached_tokens or 0:,} from cache" if details else "cache unknown (--enable-cache-report)"
        first_token = f"{first:.2f} s" if first is not None else "never"
        print(f"[{usage.prompt_tokens:,} prompt tokens, {cached}; first token after {first_token}]\n")
    return answer


def turns(command_line: Sequence[tuple[str, str]]) -> Iterator[list[dict[str, Any]]]:
    """The content of each user message, media before the question, from the command line or else from the keyboard.

    Args:
        command_line: (option, value) pairs in their order.
    """
    pending: list[dict[str, Any]] = []
    asked = False
    for kind, value in command_line:
        if kind != "question":
            pending.append(media_part(kind, value))
            continue
        print(f"> {value}")
        yield [*pending, {"type": "text", "text": value}]
        pending, asked = [], True
    if asked:
        if pending:
            raise BadInput("a video or image at the end has no question; put --question after it")
        return
    if sys.stdin.isatty():
        print("Ask something. /video FILE and /image FILE attach to the next question, /quit ends.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command in ("/video", "/image"):
            try:
                pending.append(media_part(command[1:], value.strip()))
            except BadInput as error:  # a typing error must not end the conversation
                print(f"error: {error}")
        elif line:
            yield [*pending, {"type": "text", "text": line}]
            pending = []


class InOrder(argparse.Action):
    """Collects (option, value) pairs of several options in one list, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        namespace.given = [*namespace.given, (self.dest, values)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="Order counts: media go with the next --question."
    )
    parser.add_argument("--url", default="http://localhost:30000/v1", help="the server's OpenAI API (%(default)s)")
    for option, metavar in (("video", "FILE|URL"), ("image", "FILE|URL"), ("question", "TEXT")):
        parser.add_argument(f"--{option}", action=InOrder, metavar=metavar, default=argparse.SUPPRESS)
    parser.add_argument("--model", help="model to ask for; the first that the server names if not given")
    parser.add_argument("--max-tokens", type=int, default=256, help="length of an answer (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for an answer (%(default)s)")
    parser.add_argument("--api-key", default="none", help="where the server wants one")
    parser.set_defaults(given=[])
    options = parser.parse_args(arguments)
    for kind, value in options.given:
        if kind != "question" and not is_url(value) and not Path(value).expanduser().is_file():
            parser.error(f"--{kind}: {value}: no such file")

    client = openai.OpenAI(base_url=options.url, api_key=options.api_key, timeout=options.timeout, max_retries=0)
    messages: list[Any] = []
    try:
        model = options.model or client.models.list().data[0].id
        for content in turns(options.given):
            messages.append({"role": "user", "content": content})
            answer = ask(client, model, messages, options.max_tokens)
            messages.append({"role": "assistant", "content": answer})
    except BadInput as error:
        return _failed(str(error))
    except openai.APITimeoutError:
        return _failed(f"no answer from {options.url} within {options.timeout:.0f} s; see --timeout")
    except openai.APIConnectionError:
        return _failed(f"no server at {options.url}; start one with `sglang serve`, or name it with --url")
    except openai.APIError as error:
        return _failed(f"the server refused: {error.message}")
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())

"""A program of SGLang's frontend about videos and images: three turns with media, a choice, and a fork.

    sglang serve --model-path Qwen/Qwen2.5-VL-7B-Instruct --attention-backend mminfer
    python frontend_program.py --video film.mp4 --image poster.png

Each question costs what is new in it. The program prints how much of every prompt came from the server's radix cache;
the two questions at the end share everything before them, and the server prefills that once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import sglang as sgl

from sglang_mminfer.frontend import MediaEndpoint, MediaError

QUESTIONS = ("Where does it take place?", "Who is in it?")


@sgl.function
def about_a_film(s: Any, video: str, image: str) -> None:
    s += sgl.user(sgl.video(video, -1) + "What happens in this video?")
    s += sgl.assistant(sgl.gen("summary"))
    s += sgl.user(sgl.image(image) + "And what does this picture show?")
    s += sgl.assistant(sgl.gen("picture"))
    s += sgl.user("Here is the video again: " + sgl.video(video, -1) + "Does the picture show something of it?")
    s += sgl.assistant(sgl.select("same", choices=["yes", "no"]))
    forks = s.fork(len(QUESTIONS))
    forks += lambda number: sgl.user(QUESTIONS[number]) + sgl.assistant(sgl.gen("answers"))
    forks.join()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", default="http://localhost:30000", help="the server (%(default)s)")
    parser.add_argument("--video", required=True, metavar="FILE|URL")
    parser.add_argument("--image", required=True, metavar="FILE|URL")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of an answer (%(default)s)")
    parser.add_argument("--api-key", help="where the server wants one")
    options = parser.parse_args(arguments)
    try:
        backend = MediaEndpoint(options.url, api_key=options.api_key)
        state = about_a_film.run(
            options.video, options.image, max_new_tokens=options.max_tokens, temperature=0, backend=backend
        )
        for name in ("summary", "picture"):
            cost = state.get_meta_info(name)
            print(f"{name}: {state[name].strip()}")
            print(f"[{cost['prompt_tokens']:,} prompt tokens, {cost['cached_tokens']:,} from cache]\n")
        print(f"of the same film: {state['same']}\n")
        state.sync()
        for question, answer in zip(QUESTIONS, state["answers"]):
            print(f"{question} {answer.strip()}")
    except MediaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

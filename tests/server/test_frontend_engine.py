"""The same programs in `sglang.Engine`, without HTTP: the engine in a process of its own, as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from config_files import config_file
from serving import Media

PROGRAM = """
import json, sys, threading
import sglang as sgl
from sglang_mminfer.frontend import EngineEndpoint, MediaError

@sgl.function
def program(s, video, image):
    s += sgl.user(sgl.video(video, -1) + "What do you see in the video?")
    s += sgl.assistant(sgl.gen("first"))
    s += sgl.user(sgl.image(image) + sgl.video(video, -1) + "Compare both.")
    s += sgl.assistant(sgl.gen("second"))
    s += sgl.user("Which one?") + sgl.assistant(sgl.select("third", choices=["the river", "seven"]))
    forks = s.fork(3)
    forks += lambda number: sgl.user(f"Question {number}?") + sgl.assistant(sgl.gen("forked"))
    forks.join()

def main():
    model, config, video, image = sys.argv[1:]
    engine = sgl.Engine(model_path=model, attention_backend="mminfer", device="cpu", log_level="error",
                        json_model_override_args=json.dumps({"mminfer_config": config}))
    backend = EngineEndpoint(engine)
    asked = dict(max_new_tokens=6, temperature=0, ignore_eos=True, backend=backend)
    state = program.run(video, image, **asked)
    streamed = program.run(video, image, stream=True, **asked)
    pieces = list(streamed.text_iter("second"))
    list(streamed.text_iter())  # until the program has ended: a variable of forks is there when they are joined
    seen = {name: [state[name], streamed[name]] for name in ("first", "second", "third", "forked")}
    cached = state.get_meta_info("second")["cached_tokens"], state.get_meta_info("first")["prompt_tokens"]
    direct = engine.generate(prompt="And now?", sampling_params={"max_new_tokens": 2})["text"]
    try:
        program.run(video + ".png", image, **asked)["first"]
        error = ""
    except MediaError as raised:
        error = str(raised)
    threads = [thread.name for thread in threading.enumerate() if "run_forever" in thread.name]
    engine.shutdown()
    print(json.dumps([seen, pieces, cached, direct, error, threads]))

if __name__ == "__main__":
    main()
"""


def test_a_program_runs_in_an_engine(model: Path, media: Media, tmp_path: Path) -> None:
    path, video, image = tmp_path / "program.py", str(media.videos[0]), str(media.images[0])
    path.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path), str(model), config_file("test_mixed_heads"), video, image],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen, pieces, (cached, before), direct, error, threads = json.loads(done.stdout.splitlines()[-1])
    assert all(answer == streamed for answer, streamed in seen.values())
    assert seen["third"][0] in ("the river", "seven") and len(seen["forked"][0]) == 3
    assert "".join(pieces) == seen["second"][0] and len(pieces) > 1
    assert cached >= before - 1
    assert direct and threads == []
    assert error == f"{video}.png: cannot be read: No such file or directory"

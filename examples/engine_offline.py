"""Ask about an image and a video without a server: `sglang.Engine` in this program, prefill through mminfer.

    python engine_offline.py --model-path Qwen/Qwen2.5-VL-7B-Instruct --video film.mp4 --image poster.png

Without --model-path the program makes a tiny model with random weights and a video of moving shapes, so that it runs
anywhere. The answer is nonsense then, but the figures of the prefill are real.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sglang_mminfer import HeadConfig, settings
from sglang_mminfer.serving.trace import read_trace
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools.media import make_image, make_video

GRID = {"kind": "grid", "stride": "frame", "v": True, "h": True, "s": True, "phase": 0, "sink": 16, "local": 48}
SMALL = {
    "schema": 1,
    "model": None,
    "provenance": {"how": "handwritten", "note": "For a short clip and a tiny model."},
    "heads": {"all": {"boundary": "none", "pattern": GRID}},
}
"""A short clip would run dense under `default`, because that is faster, and show nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model-path", help="a folder or hub name; a tiny random model is made if not given")
    parser.add_argument("--head-config", help="name or path; `default` for a given model, a small one for the tiny")
    parser.add_argument("--video", help="a file or URL; moving shapes if not given")
    parser.add_argument("--image", help="a file or URL; a still of such shapes if not given")
    parser.add_argument("--question", default="What do you see in the video? Is that so in the picture?")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    for kind in ("video", "image"):
        source = getattr(options, kind)
        if source and "://" not in source and not Path(source).is_file():
            parser.error(f"--{kind}: {source}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        head_config = options.head_config or "default"
        if options.head_config is None and options.model_path is None:
            head_config = str(Path(folder) / "small.json")
            Path(head_config).write_text(json.dumps(SMALL))
        try:
            HeadConfig.load(head_config)
        except ValueError as error:
            parser.error(f"--head-config: {error}")
        return run(options, head_config, Path(folder))


def run(options: argparse.Namespace, head_config: str, folder: Path) -> int:
    import sglang
    import torch
    from transformers import AutoProcessor

    if options.model_path is None:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    model = options.model_path or str(make_tiny_qwen2_5_vl(folder / "model"))
    video = options.video or str(make_video(folder / "video.mp4", 64, 224, 224, 4, seed=1))
    image = options.image or str(make_image(folder / "image.png", 224, 168, seed=2))
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": options.question}]
    prompt = AutoProcessor.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )

    trace = folder / "trace.jsonl"
    # Before the engine starts: its scheduler is another process, which inherits this.
    os.environ[settings.TRACE.variable] = str(trace)
    engine = sglang.Engine(
        model_path=model,
        attention_backend="mminfer",
        device=None if torch.cuda.is_available() else "cpu",  # SGLang takes a CPU only if it is told to
        # This names the head config where there is no command line. SGLANG_MMINFER_CONFIG does the same.
        json_model_override_args=json.dumps({"mminfer_config": head_config}),
        chunked_prefill_size=2048,
        log_level="error",
    )
    try:
        answer = engine.generate(
            prompt=prompt,
            video_data=[video],
            image_data=[image],
            sampling_params={"temperature": 0, "max_new_tokens": options.max_tokens},
        )
    finally:
        engine.shutdown()

    print(f"answer: {answer['text'].strip()}\n\nprefill under the head config {head_config}:")
    for record in read_trace(trace):
        if record.rid == answer["meta_info"]["id"]:
            rows = f"tokens {record.prefix_len:,} to {record.seq_len:,}"
            if record.dense_reason:
                print(f"  {rows}: dense ({record.dense_reason})")
            else:
                print(
                    f"  {rows}: {record.sparse_layers} layers sparse, {record.density:.0%} of the (query, key) pairs "
                    f"visited, attention {record.attn_ms:,.0f} ms"
                )
    return 0


# SGLang starts its scheduler with `spawn`, which imports this file again. Without the guard this would never end.
if __name__ == "__main__":
    sys.exit(main())

"""Accuracy of a needle model by length, in this process: dense, and under a mask that damages the rows of media.

    python examples/needle_vlm/evaluate.py examples/needle_vlm/video video
    python examples/needle_vlm/evaluate.py examples/needle_vlm/video video --mask tri-shape --lengths 1024 2048 4096
    python examples/needle_vlm/evaluate.py examples/needle_vlm/video video --files 5   # through mp4 and processor

With the mask "tri-shape", text rows see everything, and vision rows see a sink and a local window. Plain needles
survive it, because only the question's rows look for them. Relays do not, because a relay's own row must find the
needle that the relay names.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import score
from sglang_mminfer.tools.needles import media_files, sequence, task
from sglang_mminfer.tools.needles.media_files import MM_PROCESS_CONFIG


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy of a needle model by length.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("task", choices=("video", "mixed"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens, about")
    parser.add_argument("--questions", type=int, default=200, help="at each length, about")
    parser.add_argument("--mask", choices=("dense", "tri-shape"), default="dense")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--local", type=int, default=256)
    parser.add_argument("--needles", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", type=int, metavar="N", help="N conversations through files and transformers instead")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line for each length")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    make = task.video_conversation if options.task == "video" else task.mixed_conversation
    # The signs are drawn otherwise than in training.
    bank_seed = 1000 + options.seed
    if options.files:
        return through_files(options, make, bank_seed)

    import transformers

    processor = transformers.AutoProcessor.from_pretrained(options.checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    vocabulary = sequence.Vocabulary(processor.tokenizer)
    for length in options.lengths:
        random = np.random.default_rng((options.seed, length))
        right: dict[str, list[bool]] = defaultdict(list)
        tokens, start = [], time.monotonic()
        while sum(len(values) for values in right.values()) < options.questions:
            # The default interval of 1 second is that of files, which have 2 frames per second.
            conversation = make(length // 16, options.needles, random)
            item = sequence.build(conversation, vocabulary, bank_seed=bank_seed)
            mask = None
            if options.mask == "tri-shape":
                mask = score.tri_shape(score.vision_rows(item, vocabulary), options.sink, options.local)[None, None]
            is_far = score.far_relays(item, options.local)
            tokens.append(len(item.ids))
            for is_right, turn in zip(score.answered(model, item, vocabulary, mask), conversation.turns):
                name = "plain"
                if turn.relay:
                    name = "relay far" if is_far[task.KEYS.index(turn.question)] else "relay near"
                right[name].append(bool(is_right))
        figures = {name: [sum(values), len(values)] for name, values in sorted(right.items())}
        shares = "  ".join(
            f"{name} {100 * is_right / count:.1f} % of {count}" for name, (is_right, count) in figures.items()
        )
        print(f"{options.mask}  {np.mean(tokens):.0f} tokens  {shares}  ({time.monotonic() - start:.0f} s)", flush=True)
        if options.json:
            with options.json.open("a") as file:
                line = {
                    "checkpoint": options.checkpoint.name,
                    "task": options.task,
                    "mask": options.mask,
                    "tokens": round(float(np.mean(tokens))),
                    "seed": options.seed,
                    "right_of": figures,
                }
                file.write(json.dumps(line) + "\n")
    return 0


def through_files(options: argparse.Namespace, make: Any, bank_seed: int) -> int:
    """The accuracy through H.264 and PNG files, a server's sampling, the checkpoint's processor and transformers."""
    from sglang_mminfer.testing.oracle import HFOracle

    oracle = HFOracle(options.checkpoint, mm_process_config=MM_PROCESS_CONFIG)
    digits = set(task.DIGITS)
    for length in options.lengths:
        random = np.random.default_rng((options.seed, length))
        right: dict[str, list[bool]] = defaultdict(list)
        tokens = []
        for _ in range(options.files):
            conversation = make(length // 16, options.needles, random, questions=4)
            with tempfile.TemporaryDirectory() as folder:
                chat = media_files.messages(conversation, folder, bank_seed=bank_seed)
                for i, turn in enumerate(conversation.turns):
                    answer = oracle.answer(chat[: 2 * i + 1], max_new_tokens=2)
                    assert answer.text.strip() in digits or answer.text, answer
                    right["relay" if turn.relay else "plain"].append(answer.text == turn.answer)
                tokens.append(len(answer.prompt_ids))
        shares = "  ".join(f"{name} {sum(values)} of {len(values)}" for name, values in sorted(right.items()))
        print(f"files  {np.mean(tokens):.0f} tokens  {shares}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Trains a small Qwen2.5-VL to find needles, on one CPU core, and writes its checkpoint.

    python examples/needle_vlm/train.py video --out NEW_FOLDER
    python examples/needle_vlm/train.py mixed --out NEW_FOLDER --start-from examples/needle_vlm/video --words-from-cards

Each step is a batch of new conversations (sglang_mminfer/tools/needles/task.py), which depend only on the seed, the
step and the level of the curriculum. OUT.state keeps weights, optimizer and level, so the same command continues where
it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import network
from sglang_mminfer.testing import needle_model
from sglang_mminfer.tools.needles import pictures, sequence, task

LEVELS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Pairs of frames at each level. The first level is one picture with one needle: training that started with four
pictures never learned."""
MOST_NEEDLES = 12
PASS = 0.9
"""The accuracy, of plain needles and of relays, that leads to the next level."""
MEMORY = 0.95
"""The weight of earlier steps in the running accuracy."""
BANK = 1024
"""How many haystack windows are in memory. They are drawn anew every BANK_STEPS steps."""
BANK_STEPS = 250
SEEN_EMPTY = 0.1
"""The share of windows without a card that train the vision tower. The others pass through it without gradients, which
is cheap."""


CARDS = 24
"""How many cards are averaged for a needle word's embedding."""


class Helpers(nn.Module):
    """Linear readers of hidden states for the auxiliary losses. They are not part of the model."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.left = nn.Linear(hidden, 16)
        self.right = nn.Linear(hidden, 26)
        self.digit = nn.Linear(hidden, 10)
        self.answer = nn.Linear(hidden, 10)


@dataclass
class Progress:
    """How far training has come. `plain` and `relay` are running accuracies; `at_level` counts steps."""

    step: int = 0
    level: int = 0
    at_level: int = 0
    plain: float = 0.0
    relay: float = 0.0
    seconds: float = 0.0


class Bank:
    """Haystack windows, which many steps share because drawing frames is slow."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, -1
        self.windows = np.empty((0, 64, 1176), np.uint8)

    def at(self, step: int) -> None:
        if step // BANK_STEPS == self.epoch:
            return
        self.epoch = step // BANK_STEPS
        random = np.random.default_rng((self.seed, 1, self.epoch))
        clips = []
        for _ in range(BANK // 32):
            frames = pictures.haystack(64, pictures.TILE, int(random.integers(1 << 31)), random.uniform(0.05, 1))
            grain = random.normal(0, random.uniform(0, 5), frames.shape[1:])
            clips.append(pictures.patches(np.clip(frames + grain, 0, 255).astype(np.uint8)))
        self.windows = np.concatenate(clips)

    def hay(self, part: task.Part) -> np.ndarray:
        count = part.size if part.kind == "video" else (part.side // pictures.TILE) ** 2
        first = part.seed % (BANK - count + 1)
        return self.windows[first : first + count]


def batch(
    kind: str,
    level: int,
    tokens: int,
    spacing: tuple[float, float],
    random: np.random.Generator,
    vocabulary: sequence.Vocabulary,
    bank: Bank,
) -> list[sequence.Sequence]:
    """Conversations of one length, about `tokens` tokens in all. Most batches are of this level, others of a lower."""
    if level and random.random() < 0.3:
        level = int(random.integers(level))
    pairs = LEVELS[level]
    if level > 1:
        pairs = int(random.integers(LEVELS[level - 1] + 1, pairs + 1))
    make = task.video_conversation if kind == "video" else task.mixed_conversation
    conversations: list[sequence.Sequence] = []
    tokens_left = tokens
    while tokens_left > 0:
        needles = 1 if level == 0 else int(random.integers(2, min(MOST_NEEDLES, 2 * LEVELS[level]) + 1))
        conversation = make(pairs, needles, random, interval=spacing)
        conversations.append(sequence.build(conversation, vocabulary, bank.hay, random))
        tokens_left -= max(len(conversations[-1].ids), len(conversations[0].ids))
        if tokens_left < len(conversations[-1].ids) // 2:
            break
    return conversations


def losses(
    model: Any,
    helpers: Helpers,
    group: list[sequence.Sequence],
    vocabulary: sequence.Vocabulary,
    random: np.random.Generator,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The losses by name; for each question, whether the answer is right, and whether it is about a relay."""
    length = max(len(item.ids) for item in group)
    ids = torch.full((len(group), length), vocabulary.pad)
    positions = torch.zeros(3, len(group), length, dtype=torch.int64)
    for i, item in enumerate(group):
        ids[i, : len(item.ids)] = torch.from_numpy(item.ids)
        positions[:, i, : len(item.ids)] = torch.from_numpy(item.positions)

    def joined(name: str, offset_columns: int) -> torch.Tensor:
        """The rows of all sequences. Their first columns, which are tokens, become indices into the flat batch."""
        parts = []
        for i, item in enumerate(group):
            rows = getattr(item, name).copy()
            if rows.ndim == 1:
                rows = rows + i * length
            else:
                rows[:, :offset_columns] += i * length
            parts.append(rows)
        return torch.from_numpy(np.concatenate(parts))

    vision, answers, needles = joined("vision", 1), joined("answers", 2), joined("needles", 1)
    embeddings = model.model.language_model.embed_tokens(ids).flatten(0, 1)
    if len(vision):
        windows = sequence.normalized(np.concatenate([item.windows for item in group]))
        corners = torch.from_numpy(np.concatenate([item.corners for item in group]))
        is_trained = torch.from_numpy(
            np.concatenate([item.carded for item in group]) | (random.random(len(windows)) < SEEN_EMPTY)
        )
        cells = torch.empty(len(windows), 16, embeddings.shape[-1])
        with torch.no_grad():
            if not is_trained.all():
                cells[~is_trained] = network.encode_windows(model, windows[~is_trained], corners[~is_trained]).view(
                    -1, 16, embeddings.shape[-1]
                )
        if is_trained.any():
            trained_cells = network.encode_windows(model, windows[is_trained], corners[is_trained])
            cells = cells.index_put((is_trained.nonzero()[:, 0],), trained_cells.view(-1, 16, embeddings.shape[-1]))
        embeddings = embeddings.index_put((vision,), cells.flatten(0, 1))
    states = network.run_layers(model, embeddings.view(len(group), length, -1), positions)
    first, middle, last = (state.flatten(0, 1) for state in (states[1], states[-2], states[-1]))

    digits = torch.tensor([vocabulary.digit[digit] for digit in task.DIGITS])
    vocabulary_ids = torch.arange(model.lm_head.weight.shape[0])
    logits = network.answer_logits(model, last[answers[:, 1]], vocabulary_ids)
    ends = network.answer_logits(model, last[answers[:, 1] + 1], vocabulary_ids)
    target = digits[answers[:, 2]]
    named_losses = {
        "answer": functional.cross_entropy(logits, target),
        "end": functional.cross_entropy(ends, torch.full((len(ends),), vocabulary.done[0])),
        "signs": functional.cross_entropy(helpers.left(embeddings[needles[:, 0]]), needles[:, 1])
        + functional.cross_entropy(helpers.right(embeddings[needles[:, 0]]), needles[:, 2]),
        "relay": functional.cross_entropy(helpers.digit(rms(first[needles[:, 0]])), needles[:, 3]),
        "key": functional.cross_entropy(helpers.answer(rms(middle[answers[:, 0]])), answers[:, 2]),
    }
    return named_losses, (logits.argmax(-1) == target), answers[:, 3].bool()


def rms(state: torch.Tensor) -> torch.Tensor:
    return state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6)


# The weight of each loss: at first, and in the last part of the run.
WEIGHTS = {"answer": (1.0, 1.0), "end": (0.1, 0.1), "signs": (1.0, 0.1), "relay": (1.0, 0.3), "key": (0.5, 0.0)}


@torch.no_grad()
def words_from_cards(model: Any, vocabulary: sequence.Vocabulary, seed: int) -> None:
    """Set the embedding of every needle word to the mean token of cards with the same needle: a model that was trained
    on videos then knows needles in text."""
    random = np.random.default_rng((seed, 2))
    weight = model.model.language_model.embed_tokens.weight
    hay = pictures.haystack(2 * CARDS, pictures.TILE, seed)
    pairs = torch.arange(CARDS)
    for word in task.NEEDLE_WORDS:
        frames, cells = hay.copy(), random.integers(16, size=CARDS)
        for pair, cell in enumerate(cells):
            card = sequence.draw_card(word[0], word[-1], random)
            pictures.put_card(frames[2 * pair : 2 * pair + 2], int(cell), card)
        tokens = network.encode_windows(
            model, sequence.normalized(pictures.patches(frames)), torch.zeros(CARDS, 2, dtype=torch.int64)
        )
        weight[vocabulary.needle(word)] = tokens.view(CARDS, 16, -1)[pairs, torch.from_numpy(cells)].mean(0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small vision-language model to find needles.")
    parser.add_argument("task", choices=("video", "mixed"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--start-from", type=Path, help="checkpoint of the same size")
    parser.add_argument("--words-from-cards", action="store_true", help="teaches it the words for needles, before all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=2048, help="about so many in a step")
    parser.add_argument("--layers", type=int, default=needle_model.SIZES["layers"])
    parser.add_argument("--hidden", type=int, default=needle_model.SIZES["hidden"])
    parser.add_argument("--level", type=int, default=0, help="of the curriculum, to start at")
    parser.add_argument("--spacing", type=float, nargs=2, default=(0.17, 16.0), help="seconds from pair to pair")
    parser.add_argument("--log-every", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    processor = needle_model.make_processor()
    vocabulary = sequence.Vocabulary(processor.tokenizer)
    sizes = {"layers": options.layers, "hidden": options.hidden, "intermediate": 2 * options.hidden}
    model = needle_model.make_model(processor.tokenizer, options.seed, **sizes)
    torch.manual_seed(options.seed)
    helpers = Helpers(options.hidden)
    progress = Progress(level=options.level)
    groups = [*model.parameters(), *helpers.parameters()]
    decayed = [p for p in groups if p.dim() > 1 and p is not model.model.language_model.embed_tokens.weight]
    others = [p for p in groups if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )
    state_file = options.out.with_name(options.out.name + ".state")
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        helpers.load_state_dict(saved["helpers"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
        print(f"goes on at step {progress.step}", flush=True)
    elif options.start_from:
        import transformers

        start_model = transformers.AutoModelForImageTextToText.from_pretrained(options.start_from, dtype=torch.float32)
        model.load_state_dict(start_model.state_dict())
        if options.words_from_cards:
            words_from_cards(model, vocabulary, options.seed)

    def save_state() -> None:
        fresh = state_file.with_name(state_file.name + ".new")
        torch.save(
            {
                "model": model.state_dict(),
                "helpers": helpers.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": vars(progress),
            },
            fresh,
        )
        os.replace(fresh, state_file)

    bank = Bank(options.seed)
    started, seconds_before = time.monotonic(), progress.seconds
    logged: dict[str, list[float]] = {}
    while progress.step < options.steps:
        random = np.random.default_rng((options.seed, 0, progress.step))
        bank.at(progress.step)
        group = batch(options.task, progress.level, options.tokens, tuple(options.spacing), random, vocabulary, bank)
        named_losses, right, relay = losses(model, helpers, group, vocabulary, random)
        share = progress.step / options.steps
        decay = max(0.0, (share - 0.6) / 0.4)
        loss = sum(value * (WEIGHTS[name][decay > 0]) for name, value in named_losses.items())
        rate = options.lr * min(1.0, (progress.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * decay)))
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(groups, 1.0)
        optimizer.step()
        progress.step += 1
        progress.at_level += 1
        progress.seconds = seconds_before + time.monotonic() - started
        for name, mask in (("plain", ~relay), ("relay", relay)):
            if mask.any():
                accuracy = float(right[mask].float().mean())
                setattr(progress, name, MEMORY * getattr(progress, name) + (1 - MEMORY) * accuracy)
                logged.setdefault(name, []).append(accuracy)
        for name, value in named_losses.items():
            logged.setdefault("loss " + name, []).append(float(value.detach()))
        passed = progress.plain > PASS and (progress.relay > PASS or progress.level == 0)
        if passed and progress.at_level >= 30 and progress.level + 1 < len(LEVELS):
            progress.level, progress.at_level, progress.plain, progress.relay = progress.level + 1, 0, 0.0, 0.0
            print(f"step {progress.step}: level {progress.level}, {LEVELS[progress.level]} pairs", flush=True)
        if progress.step % options.log_every == 0:
            means = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(logged.items()))
            print(
                f"{progress.step}/{options.steps}  {progress.seconds:.0f} s  {LEVELS[progress.level]} pairs  "
                f"lr {rate:.1e}  norm {float(norm):.2f}  {means}",
                flush=True,
            )
            logged = {}
        if progress.step % 100 == 0:
            save_state()
    save_state()
    needle_model.save_checkpoint(model, processor, options.out)
    print(f"wrote {options.out} after {progress.seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The server of each model family, the media that it gets, and the answers of its oracle to them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from config_files import config_file
from families import FAMILIES, Family
from serving import LAYERS, ROUNDING, SPECULATION, Dialogue, Message, Served, assistant, image, text, user, video
from sglang_mminfer.testing.oracle import OracleAnswer, compare
from sglang_mminfer.tools.media import make_image, make_video
from sounds import make_sound

CHUNK = 117
EVERYTHING = 1 << 30

FAMILY_SERVERS: dict[str, tuple[Family, int]] = {
    **{family.name: (family, 1) for family in FAMILIES},
    **{f"{family.name}_2_ranks": (family, 2) for family in FAMILIES if family.tensor_parallel},
}
"""The family and the number of ranks of each server."""

MIXED_SERVERS = {"mixed_internvl": "internvl", "mixed_llava_video": "llava_video"}
"""The family of each server whose config leaves much out, and which mixes decoding into chunks and retracts requests.
One family has SGLang's model class and one has ours. Neither has M-RoPE; Qwen2.5-VL, which has it, is server "main"."""

DRAFTED_SERVERS = {"qwen3_vl_eagle3": "qwen3_vl"}
"""Servers with a draft model, and the family server that has none and is the same otherwise."""

MIXED_FLAGS = (
    *("--attention-backend", "mminfer", "--mminfer-config", config_file("test_a_shape"), "--sleep-on-idle"),
    *("--chunked-prefill-size", "96", "--enable-mixed-chunk"),
)

ALWAYS = {family.module: family.name for family in reversed(FAMILIES) if family.module != "qwen2_5_vl"}.values()
"""Servers of `make test`: the first of each module on one rank. Other tests of this folder cover Qwen2.5-VL,
and Qwen2-VL goes as it does."""

EVERY_SERVER = [
    pytest.param(name, marks=[pytest.mark.server(name), *([] if name in ALWAYS else [pytest.mark.families])])
    for name in FAMILY_SERVERS
]
"""The parameters of a test that runs on every family's server."""


def mixed_server(name: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """As `family_server`, for a server of `MIXED_SERVERS`."""
    family, _ = FAMILY_SERVERS[MIXED_SERVERS[name]]
    options = ("--mm-process-config", json.dumps({"video": dict(family.video_options)})) if family.video_options else ()
    return family.make(folder / "model"), (*MIXED_FLAGS, *options, *family.flags)


def family_server(name: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A new checkpoint in `folder`, and the flags of its server."""
    family, ranks = FAMILY_SERVERS[name]
    path = family.make(folder / "model")
    assert json.loads((path / "config.json").read_text())["architectures"] == [family.architecture]
    options = ("--mm-process-config", json.dumps({"video": dict(family.video_options)})) if family.video_options else ()
    return path, (
        *("--attention-backend", "mminfer", "--mminfer-config", str(write_config(family, folder / "heads.json"))),
        *("--sleep-on-idle", "--chunked-prefill-size", str(CHUNK), "--tp-size", str(ranks)),
        *options,
        *family.flags,
    )


def drafted_server(name: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """As `family_server`, for a server of `DRAFTED_SERVERS`."""
    path, flags = family_server(DRAFTED_SERVERS[name], folder)
    return path, (*flags, *SPECULATION)


def write_config(family: Family, path: Path) -> Path:
    """A config with every pattern that the family allows. Its windows of `reach` tokens leave nothing out."""
    covering = Path(config_file("test_covering_mixed")).read_text()
    config = json.dumps(json.loads(covering.replace(str(EVERYTHING), str(family.reach))))
    if "row grid" not in family.patterns:
        config = config.replace('"row"', '"frame"')
    path.write_text(config)
    return path


@dataclass(frozen=True)
class Files:
    """The media that every family gets."""

    images: tuple[Path, Path]
    videos: tuple[Path, Path]
    odd: dict[str, Path]
    """Unusual videos that can be read."""
    unreadable: dict[str, Path]
    """Paths that hold no video."""
    sounds: tuple[Path, Path]
    """Noise of two lengths. Transformers pads the end of a sound of less than a second if a longer one is beside it,
    and so its encoding depends on others."""


def make_shown(root: Path) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """Two pictures and two videos that every family takes."""
    images = (make_image(root / "a.png", 256, 64, seed=1), make_image(root / "b.png", 64, 256, seed=2))
    return images, (
        make_video(root / "a.mp4", 12, 128, 96, 4, seed=1),
        make_video(root / "b.mp4", 8, 96, 128, 4, seed=2),
    )


def make_files(root: Path) -> Files:
    import imageio_ffmpeg

    steady = make_video(root / "steady.mp4", 24, 96, 64, 8, seed=1)
    uneven = root / "uneven.mp4"
    subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(steady)),
            *("-vf", "select='lt(n,8)+not(mod(n,4))'", "-fps_mode", "vfr", str(uneven)),
        ],
        check=True,
    )
    (root / "broken.mp4").write_bytes(steady.read_bytes()[:1500])
    (root / "words.mp4").write_text("This is no video.")
    images, videos = make_shown(root)
    return Files(
        images=images,
        videos=videos,
        odd={
            "uneven": uneven,
            "portrait": make_video(root / "portrait.mp4", 10, 96, 160, 4, seed=3),
            "one_frame": make_video(root / "one.mp4", 1, 64, 64, 8, seed=2),
            # The seed matters. In some videos the scores of two pairs of patches agree to the ninth digit, and rounding
            # decides which pair VideoChat-Flash merges.
            "10000_frames": make_video(root / "long.mp4", 10_000, 64, 64, 25, seed=6),
        },
        unreadable={name: root / f"{name}.mp4" for name in ("broken", "words", "missing")},
        sounds=(make_sound(root / "a.wav", 1.3, seed=1), make_sound(root / "b.wav", 1.6, seed=2)),
    )


@dataclass(frozen=True)
class Running:
    """A family's server, its oracle, and the media that both get."""

    family: Family
    served: Served
    oracle: Any
    files: Files
    long_video: Path

    def ask(self, messages: list[Message], rid: str, expected: OracleAnswer | None = None) -> OracleAnswer:
        """The server's answer, compared with the oracle's and with the server's trace."""
        if expected is None:
            expected = self.oracle.answer(messages)
        got = self.served.ask(messages, len(expected.token_ids), rid=rid)
        self.hold(expected, got)
        records = self.served.records(rid)
        assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - (got.cached_tokens or 0)
        longest = max(r.chunk_len for r in records)
        assert longest <= CHUNK if self.family.chunked_prefill else len(records) == 1
        return got

    def hold(self, expected: OracleAnswer, got: OracleAnswer) -> None:
        """Asserts that an answer equals the expected one."""
        assert len(got.prompt_ids) + len(got.token_ids) <= self.family.reach, "longer than what the config covers"
        result = compare(expected, got)
        assert result.prompt_equal and result.tokens_equal and result.max_difference < ROUNDING, str(result)
        assert result.compared_positions == len(expected.token_ids)

    def hold_cached(self, cached: list[int], lengths: list[int]) -> None:
        """Asserts how much of each turn's prompt was found by a client that asks what another has asked before."""
        if self.family.recurrent:
            for found, known, length in zip(cached, [0, *lengths], lengths):
                assert known <= found < length
        elif self.family.cached_turns:
            assert cached == [length - 1 for length in lengths]

    def rasters(self, rid: str) -> list[str]:
        """The modalities of the segments that have a raster."""
        (found,) = (
            r.map for r in self.served.records(rid) if r.map
        )  # only the record of the prompt's last chunk has a map
        return [entry.modality for entry in found if entry.grid is not None]

    @property
    def questions(self) -> list[Message]:
        """The user's messages of a conversation of four turns."""
        (first, second), (one, other) = self.files.videos, self.files.images
        return [
            user(video(first) if self.family.video else image(other), text("What do you see?")),
            user(text("And now?")),
            user(text("Is that so?"), image(one)),
            user(text("Tell me more."), *([video(second)] if self.family.several_videos else [image(other)])),
        ]

    @cached_property
    def turns(self) -> Dialogue:
        """The turns of the conversation with the oracle's answers. Each answer is part of the next turn's prompt."""
        messages: list[Message] = []
        dialogue = []
        for turn in self.questions:
            messages = [*messages, turn]
            answer = self.oracle.answer(messages)
            dialogue.append((messages, answer))
            messages = [*messages, assistant(answer.text)]
        return dialogue

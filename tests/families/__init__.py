"""The model families that the server is tested with, and what holds for each.

A module here that has `FAMILIES` is the proof of one of the product's families: it makes checkpoints, tiny and
random, with the files, keys and configs of released ones, and it holds the oracle that answers are compared with. No
list names the modules. Tests run over the families, and a support matrix says what they ran.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RASTER = ("boundaries", "frame grid", "row grid")
NO_ROWS = ("boundaries", "frame grid")


@dataclass(frozen=True)
class Prompt:
    """How a family's prompts are processed.

    Attributes:
        module: of SGLang's multimodal processors, with the processor's class.
        image, video: what the chat template writes for one.
        expanded: kinds of media whose tokens a client may send back.
    """

    module: str
    image: str
    video: str = ""
    expanded: tuple[str, ...] = ()


def with_options(oracle: Callable[..., Any]) -> Callable[..., Any]:
    """The `Family.oracle` of an oracle that takes --mm-process-config, as `HFOracle` does."""
    return lambda path, video: oracle(path, mm_process_config={"video": video})


@dataclass(frozen=True)
class Family:
    """One family as SGLang serves it with this plugin.

    Attributes:
        name: of tests.
        title: of released models.
        architecture: what their config.json names.
        maker: a function of the checkpoint's folder, and of `recipe`.
        oracle: a function of that folder and of `video_options`.
        oracle_title: what answers are compared with, in words.
        served_by: "SGLang" for its own model class, "fallback" for its class around any of transformers, "plugin"
            for one of this package.
        images, video, several_videos, sound: what a turn may hold.
        cached_turns: whether a turn finds the turns before it in the radix cache.
        recurrent: whether layers have a recurrent state, so that a prefix is found only up to where a request or a
            chunk ended.
        lone_image: whether an image that is the only one of a prompt is laid out otherwise than one of several, so
            that a second image ends the cached prefix at the first.
        chunked_prefill: whether a prompt is prefilled in chunks.
        tensor_parallel: whether it runs on several ranks.
        patterns: what its rasters allow.
        one_frame: what a client is told whose video has a single frame; empty where that is served.
        reach: tokens that hold two videos and a picture of the tests, and leave a long prompt sparse.
        long_video, long_videos: frames, width, height and frames a second of a video, and how many of it make a
            prompt of more than 1.2 times `reach`.
        video_options: of --mm-process-config for its server.
        flags: what its server needs beside the usual.
        prompt: how its prompts are processed; None where another family's tests say enough of that.
    """

    name: str
    title: str
    architecture: str
    maker: Callable[..., Path]
    oracle: Callable[..., Any]
    oracle_title: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    served_by: Literal["SGLang", "fallback", "plugin"] = "SGLang"
    images: bool = True
    video: bool = True
    several_videos: bool = True
    sound: bool = False
    cached_turns: bool = True
    recurrent: bool = False
    lone_image: bool = False
    chunked_prefill: bool = True
    tensor_parallel: bool = True
    patterns: tuple[str, ...] = RASTER
    one_frame: str = ""
    reach: int = 2432
    long_video: tuple[int, int, int, float] = (64, 160, 160, 2)
    long_videos: int = 1
    video_options: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    prompt: Prompt | None = None

    def make(self, path: str | os.PathLike[str]) -> Path:
        """Writes a tiny checkpoint to the folder `path` and returns it."""
        return self.maker(path, **self.recipe)

    def make_oracle(self, path: str | os.PathLike[str]) -> Any:
        """What must be answered: an object with `answer(messages, max_new_tokens)`."""
        return self.oracle(path, dict(self.video_options))

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.maker.__module__.rpartition(".")[2]


def _found() -> tuple[Family, ...]:
    modules = (importlib.import_module(found.name) for found in pkgutil.iter_modules(__path__, f"{__name__}."))
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


FAMILIES: tuple[Family, ...] = _found()
"""By the names of their modules."""

FAMILY = {family.name: family for family in FAMILIES}
"""The same by their own names."""


def prompt_of(family: Family) -> Prompt | None:
    """How its prompts are written, if one of the families of its module says it: they agree."""
    return next((one.prompt for one in FAMILIES if one.module == family.module and one.prompt), None)

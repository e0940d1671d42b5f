"""Mends: faults in how SGLang handles media that a long conversation meets, put right here until they are upstream.

`MENDS` is the list, for people too: `mminfer doctor` and the documents print it. A mend acts in servers whose attention
backend is mminfer, and in no other. `SGLANG_MMINFER_MENDS` switches mends off by name.

Importing this module costs nothing; what a mend does stands in the module of its name, or with its family.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_mminfer import settings

ALL, NONE = "all", "none"


@dataclass(frozen=True)
class Mend:
    """One fault of SGLang and what is done about it.

    Attributes:
        name: by which the setting knows it.
        stock: what SGLang does.
        right: what a server does with the mend.
        test: the test that sees both.
        upstream: how it could be mended in SGLang itself; "" where that is no matter of a patch.
        versions: of SGLang that have the fault, as a version specifier.
    """

    name: str
    stock: str
    right: str
    test: str
    upstream: str = ""
    versions: str = ">=0.5.23,<0.5.24"


MENDS: tuple[Mend, ...] = (
    Mend(
        "separate_videos",
        "All videos of a Qwen2-VL or Qwen2.5-VL conversation are one item with one hash, so a second video voids the "
        "cached prefix of the first.",
        "Each video is an item with a hash of its own.",
        "tests/server/test_turns.py",
        "mm_utils.get_new_expanded_mm_items: split items of several videos by their grid rows.",
    ),
    Mend(
        "internvl_frames",
        "InternVL takes 32 frames of each video whatever --mm-process-config says, leaves a placeholder in the text of "
        "a prompt with images, and mixes up the hashes of frames and of images behind a video.",
        "num_frames is obeyed, and each frame is an item with a hash of its own.",
        "tests/server/test_families.py",
        "processors/internvl.py: read num_frames, one item for each frame in the order of the prompt.",
    ),
    Mend(
        "nvila_videos",
        "NVILA and NVILA-Lite fail on every video: their processor expects frames of another decoder.",
        "Videos are served, with num_frames frames.",
        "tests/server/test_families.py",
        "processors/nvila.py: take frames from VideoDecoderWrapper.",
    ),
    Mend(
        "llava_hf_videos",
        "Hugging Face LLaVA models decode every frame of a video, through torchcodec alone.",
        "SGLang's decoder reads the file; num_frames frames are taken, 32 if nothing is said.",
        "tests/server/test_families.py",
        "processors/transformers_auto.py: load videos as other processors do.",
    ),
    Mend(
        "llava_original",
        "LLaVA in its original form sees the first of several images, and the newline behind an image takes the place "
        "of the word that follows it.",
        "All images are seen, no word is lost, and a chunk encodes the images that it holds.",
        "tests/server/test_families.py",
        "models/llava.py: lay the prompt out in the processor.",
    ),
    Mend(
        "hash_of_arrangement",
        "Media of equal patches in another arrangement (a blank page upright and lying, a black video) have one hash, "
        "so the second is answered from the first one's cache.",
        "Modality, grid, sizes and seconds are part of the hash.",
        "tests/unit/mends/test_mends.py",
        "MultimodalDataItem.set_pad_value: hash the grid beside the feature.",
    ),
    Mend(
        "video_seconds",
        "Qwen2.5-VL's processor is told no frame rate and takes every video for one of 24 frames a second, so "
        "that time is squeezed twelvefold at 2 frames a second.",
        "second_per_grid is the time between two grid steps of the file, as the model was trained.",
        "tests/unit/mends/test_mends.py",
        "processors/qwen_vl.py: pass video_metadata for qwen2_5_vl, too.",
    ),
    Mend(
        "frames_apart",
        "Qwen2.5-VL's vision blocks with full attention see all frames of a video at once.",
        "They see their frame, as the model was trained and as SGLang's other Qwen models do it; a long video is "
        "encoded in a fraction of the time.",
        "tests/server/test_hf_equality.py",
        "models/qwen2_5_vl.py: cu_seqlens for each temporal patch, as compute_cu_seqlens_from_grid_numpy makes them.",
    ),
    Mend(
        "placeholder_words",
        "Words that look like placeholders (<image>, <video>, <img>, <|image_pad|>) in a question, an answer of the "
        "history or a tool's result beside media end the server, never come back, or are refused for good.",
        "Words stay words; only what the chat template wrote is bound to media.",
        "tests/unit/mends/test_mends.py",
        "serving_chat: render with unique placeholders.",
    ),
    Mend(
        "token_ids",
        "input_ids with media are decoded and encoded again, and ids of an answer sent back (with the media's tokens) "
        "hang, fail inside, or are refused.",
        "Ids outside media are never changed; expanded media are found, or refused with a sentence.",
        "tests/unit/mends/test_mends.py",
        "base_processor: expand placeholders in the ids that came.",
    ),
    Mend(
        "picture_orientation",
        "The EXIF orientation of a picture is left out: photos lie on their side.",
        "Pictures are turned as every viewer shows them, pixels and grid.",
        "tests/unit/mends/test_mends_media.py",
        "base_processor._load_single_item: ImageOps.exif_transpose, and no decoding on the GPU of turned files.",
    ),
    Mend(
        "picture_modes",
        "Grey of 16 or 32 bits and floats are white or black, and what is transparent shows the colours beneath.",
        "More than 8 bits are seen as their upper 8, transparent pixels on white.",
        "tests/unit/mends/test_mends_media.py",
        "base_processor._load_single_item: scale the modes I and F, composite alpha on white.",
    ),
    Mend(
        "odd_sizes",
        "Nothing bounds a picture, a square made of one, or the frames of a video before they are allocated; videos "
        "of less than 32 pixels across are an error of the server.",
        "Sizes are checked before anything is decoded, and the client is told size and limit; small videos are seen.",
        "tests/unit/mends/test_mends_media.py",
        "utils.common.load_image: limits on the header.",
    ),
    Mend(
        "video_frames",
        "A video given as its frames (data:video/jpeg, a list, an array) is an error of the server, or has no time.",
        "It is as a file of these frames, at 1 frame a second or the rate that is stated.",
        "tests/unit/mends/test_mends_media.py",
        "utils.common.load_video: a decoder over frames.",
    ),
    Mend(
        "video_options",
        "fps, max_frames, max_long_side_pixel and all that a request asks of one picture or video is left out.",
        "Each family does what it can, and refuses the rest by name.",
        "tests/unit/mends/test_mends_media.py",
        "base_processor._load_single_item: keep VideoData.preprocess_kwargs with the decoder.",
    ),
    Mend(
        "media_order",
        "InternVL's conversation template puts the pictures of a message before its text and its videos.",
        "They stand where the message has them, as in OpenGVLab's own code.",
        "tests/unit/mends/test_mends_media.py",
        "parser/conversation.py: internvl-2-5 without image_token_at_prefix.",
    ),
    Mend(
        "media_of_samples",
        "With n > 1 a request with several pictures is refused, and each answer sees one of several videos.",
        "Each answer sees all media of the request.",
        "tests/unit/mends/test_mends_media.py",
        "io_struct.GenerateReqInput._handle_parallel_sampling: wrap media as text is wrapped.",
    ),
    Mend(
        "sessions",
        "A turn of a session keeps all media of its parent whatever its offset cuts off, and the server ends; it ends, "
        "too, when a session is replaced or closed while a turn runs, or a turn with media names no known parent.",
        "A turn has the media that its offset leaves; one cut in two, or gone with an aborted turn, is a 400 that "
        "names it.",
        "tests/server/test_sessions.py",
        "session_controller.Session.create_req: drop items behind the offset, in a copy of the parent's.",
    ),
    Mend(
        "item_checks",
        "Media that a client sends preprocessed (processor_output, precomputed_embedding) are taken as they are: "
        "without a grid, with too few rows or numbers that are none they end the server.",
        "They are held against the prompt and the model first, and refused with a sentence.",
        "tests/unit/families/test_item_checks.py",
        "base_processor.process_and_combine_mm_data: validate items of clients.",
    ),
    Mend(
        "request_fields",
        "A token id that the model has no embedding of (-1, or one behind the vocabulary), an empty prompt, or more "
        "log-probabilities than there are words end the server; lists of media of another length are a 500.",
        "They are a 400 that names the field.",
        "tests/server/test_odd_fields.py",
        "TokenizerManager._validate_one_request: hold input_ids against the vocabulary.",
    ),
    Mend(
        "aborts",
        "An abort that comes while media are loaded is lost, as is a client's leaving: the request runs to its end.",
        "The request ends there, and nothing of it reaches the scheduler.",
        "tests/server/test_aborts.py",
        "TokenizerManager.abort_request: cancel what prepares a request that is not dispatched.",
    ),
)


def named(name: str) -> Mend:
    """The mend of this name."""
    return next(mend for mend in MENDS if mend.name == name)


class MendsError(ValueError):
    """`SGLANG_MMINFER_MENDS` says what cannot be understood."""


@functools.lru_cache
def _chosen(said: str) -> frozenset[str]:
    """The names that a setting leaves on.

    "all" or nothing: all. "none": none. "a,b": only these. "-a,-b": all but these.

    Raises:
        MendsError: naming the entry.
    """
    every = frozenset(mend.name for mend in MENDS)
    entries = [entry.strip() for entry in said.split(",") if entry.strip()]
    if entries in ([], [ALL]):
        return every
    if entries == [NONE]:
        return frozenset()
    if unknown := [entry for entry in entries if entry.removeprefix("-") not in every]:
        raise MendsError(
            f"{settings.MENDS.variable}: expected all, none, or names of mends ({', '.join(sorted(every))}), each with "
            f"a minus to leave it out; got {unknown[0]!r}"
        )
    without = frozenset(entry[1:] for entry in entries if entry.startswith("-"))
    if without and len(without) != len(set(entries)):
        raise MendsError(
            f"{settings.MENDS.variable}: expected names to keep, or names to leave out, not both; got {said!r}"
        )
    return every - without if without else frozenset(entries)


def active(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether a mend is switched on and the SGLang that is installed has its fault."""
    if settings.SPLIT_VIDEOS.read(environ) == "0" and name in _FIRST:
        return False
    return name in _chosen(settings.MENDS.read(environ)) and _has_fault(named(name).versions)


def why_bad() -> str | None:
    """What is wrong with the setting, None if nothing is."""
    try:
        _chosen(settings.MENDS.read())
    except MendsError as error:
        return str(error)
    return None


_FIRST = frozenset(mend.name for mend in MENDS[:5])


def active_names() -> list[str]:
    """Of all mends that are on."""
    return [mend.name for mend in MENDS if active(mend.name)]


@functools.cache
def _has_fault(versions: str) -> bool:
    return settings.sglang_is_within(versions)


def wanted(server_args: Any) -> bool:
    """Whether a server runs with mminfer, so that its media are mended."""
    if settings.SPLIT_VIDEOS.read() == "1":
        return True
    known = getattr(server_args, "_mminfer_wanted", None)
    if known is not None:
        return bool(known)
    backends = (getattr(server_args, name, None) for name in _BACKEND_FIELDS)
    return settings.BACKEND_NAME in backends


def here(name: str) -> bool:
    """Whether a mend acts in this process, where code that gets no arguments of the server asks."""
    from sglang.srt.runtime_context import get_server_args

    return wanted(get_server_args()) and active(name)


_BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def page() -> str:
    """The list as a page of the documents."""
    lines = [
        "# Mends",
        "",
        "Faults in how SGLang handles media, which a server with `--attention-backend mminfer` (or",
        "`--prefill-attention-backend mminfer`) does not have. Other servers are left as they are. Each mend is on by",
        f"default; `{settings.MENDS.variable}` says otherwise: `none`, `-name,-other` for all but these, `name,other`",
        "for these only. `mminfer doctor` lists what is on. This page is made by `python -m sglang_mminfer.mends`.",
        "",
    ]
    for mend in MENDS:
        lines += [
            f"## {mend.name}",
            "",
            f"Stock SGLang ({mend.versions}): {mend.stock}",
            "",
            f"With mminfer: {mend.right}",
        ]
        lines += ["", f"Shown by `{mend.test}`."]
        lines += [f"Upstream it would be a patch of {mend.upstream}" if mend.upstream else "It is no patch of SGLang."]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"

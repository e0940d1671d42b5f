"""Mends: faults of SGLang's media handling that long conversations meet, repaired here until SGLang repairs them.

`MENDS` lists them; `mminfer doctor` and docs/mends.md print the list. A mend acts only in servers whose attention
backend is mminfer. `SGLANG_MMINFER_MENDS` switches mends off by name.

Importing this module is cheap: it imports neither SGLang nor torch. The code of a mend stands in this folder or, if it
is for one family of models, in `families/`.
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
    """One fault of SGLang and its repair.

    Attributes:
        name: the mend's name in SGLANG_MMINFER_MENDS.
        stock: what SGLang does without the mend.
        right: what a server does with the mend.
        test: the path of the test that shows both.
        upstream: the change of SGLang that would replace the mend; "" if no change of SGLang could.
        versions: the SGLang releases that have the fault, as a version specifier.
    """

    name: str
    stock: str
    right: str
    test: str
    upstream: str = ""
    versions: str = settings.TESTED_SGLANG


MENDS: tuple[Mend, ...] = (
    Mend(
        "separate_videos",
        "All videos of a Qwen2-VL or Qwen2.5-VL conversation are one item with one hash, so a second video invalidates "
        "the cached prefix of the first.",
        "Each video is an item with a hash of its own.",
        "tests/server/test_turns.py",
        "mm_utils.get_new_expanded_mm_items: split items of several videos by their grid rows.",
    ),
    Mend(
        "internvl_frames",
        "InternVL takes 32 frames of each video whatever --mm-process-config says, leaves a placeholder in the text of "
        "a prompt with images, and mixes up the hashes of a video's frames and of the images after it.",
        "SGLang's processor obeys num_frames, and each frame is an item with a hash of its own.",
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
        "Hugging Face LLaVA models decode every frame of a video, and can use no decoder but torchcodec.",
        "SGLang's decoder reads the file and num_frames frames are used, 32 by default.",
        "tests/server/test_families.py",
        "processors/transformers_auto.py: load videos as other processors do.",
    ),
    Mend(
        "llava_original",
        "LLaVA in its original form sees only the first of several images, and the newline token after an image "
        "replaces the word that follows it.",
        "The model sees all images, no word is lost, and a chunk encodes only the images that it holds.",
        "tests/server/test_families.py",
        "models/llava.py: lay the prompt out in the processor.",
    ),
    Mend(
        "minicpm_v",
        "MiniCPM-V does not start: its class hands over an inner model without a field that SGLang's runner reads. "
        "MiniCPM-V 4.6 would be shown every frame of a video: a minute of it has more than 100,000 tokens.",
        "MiniCPM-V starts, and 4.6 is shown a frame a second and at most 128, as in its released code, or num_frames.",
        "tests/server/test_families.py",
        "models/minicpmv.py: eval returns self; processors/minicpmv4_6.py: sample frames.",
    ),
    Mend(
        "hash_of_arrangement",
        "Media with equal patches in different arrangements (a blank page upright and on its side, a black image and a "
        "black video) have the same hash, so the second is answered from the first one's cache.",
        "The hash also covers modality, grid, sizes and seconds.",
        "tests/unit/mends/test_mends.py",
        "MultimodalDataItem.set_pad_value: hash the grid beside the feature.",
    ),
    Mend(
        "video_seconds",
        "Qwen2.5-VL's processor is given no frame rate and assumes 24 frames a second, so a video sampled at 2 frames "
        "a second seems to run twelve times too fast.",
        "second_per_grid is the real time between two temporal patches, as in the model's training.",
        "tests/unit/mends/test_mends.py",
        "processors/qwen_vl.py: pass video_metadata for qwen2_5_vl, too.",
    ),
    Mend(
        "qwen3_omni",
        "Qwen3-Omni's processor assumes that a frame a second was taken of each video, so a video of which 2 were "
        "taken seems to last twice as long. A prompt with a picture or video and two sounds is an internal error.",
        "The time between two temporal patches is the real one (with video_seconds), cut to a whole position, because "
        "SGLang has no other. A prompt may have several sounds.",
        "tests/unit/families/test_qwen3_omni.py",
        "processors/qwen_vl.py: seconds of each video and the lengths of all sounds for get_rope_index.",
    ),
    Mend(
        "frames_apart",
        "Qwen2.5-VL's vision blocks with full attention see all frames of a video at once.",
        "They see one temporal patch at a time, as in training and as in SGLang's other Qwen models; encoding a long "
        "video takes a fraction of the time.",
        "tests/server/test_hf_equality.py",
        "models/qwen2_5_vl.py: cu_seqlens for each temporal patch, as compute_cu_seqlens_from_grid_numpy makes them.",
    ),
    Mend(
        "video_over_ranks",
        "With a vision encoder on all ranks (--mm-enable-dp-encoder) each medium goes to one rank. A long video of "
        "Qwen3-VL or Qwen3.5 is encoded by one of them while the others wait.",
        "Each rank encodes a clip of it. Embeddings are the same, because these encoders take every temporal patch by "
        "itself.",
        "tests/server/test_encoder_ranks.py",
        "models/qwen3_vl.py: a grid row for each clip, as models/glm4v.py has one for each temporal patch.",
    ),
    Mend(
        "modality_pickle",
        "On Python 3.11.0 to 3.11.3 the language server of encoder disaggregation refuses to unpickle what its encoder "
        "sends, and ends after three minutes.",
        "The encoder, if it is started with mminfer too, sends what other Pythons send.",
        "tests/unit/mends/test_pickles.py",
        "disaggregation/encoder/receiver.py: send the modality's name.",
        ">=0.5.21,<0.5.24",
    ),
    Mend(
        "media_at_both_ends",
        "A prompt that begins with a medium and ends with one gets wrong places for them: the answer is to something "
        "else, or the request fails, or the server ends.",
        "Media may stand anywhere.",
        "tests/unit/mends/test_mends.py",
        "base_processor.get_mm_items_offset: do not compare the first token with the last.",
    ),
    Mend(
        "router_pictures",
        "Behind a router's gRPC server (--grpc-mode) all pictures of a request are one medium, so a further picture "
        "in a later turn means that all of them and everything behind them are computed again.",
        "Each picture is a medium, as over HTTP.",
        "tests/server/test_front_ends.py",
        "Scheduler._get_multimodal_inputs: get_new_expanded_mm_items, as the processors do.",
    ),
    Mend(
        "router_positions",
        "Behind a router's gRPC server (--grpc-mode) pictures of Qwen and GLM models get the positions of a text, so "
        "answers are other ones than over HTTP.",
        "They get the positions that they have over HTTP.",
        "tests/server/test_front_ends.py",
        "managers/scheduler.py: compute M-RoPE positions before pad_input_ids replaces the tokens of media.",
    ),
    Mend(
        "placeholder_words",
        "In a conversation with media, words that look like placeholders (<image>, <video>, <img>, <|image_pad|>) in a "
        "question, an earlier answer or a tool's result end the server, leave the request without an answer, or make "
        "SGLang refuse every further turn.",
        "Words stay words; only placeholders that the chat template wrote stand for media.",
        "tests/unit/mends/test_mends.py",
        "serving_chat: render with unique placeholders.",
    ),
    Mend(
        "token_ids",
        "SGLang decodes input_ids with media and encodes the text again. If a client sends back the ids of an answer, "
        "with the media's tokens in them, the request hangs, fails with an internal error, or is refused.",
        "Ids outside media never change; media that are already expanded are recognised, or refused with a sentence.",
        "tests/unit/mends/test_mends.py",
        "base_processor: expand placeholders in the ids that came.",
    ),
    Mend(
        "picture_orientation",
        "SGLang ignores the EXIF orientation of a picture, so photos lie on their side.",
        "Pixels and grid are those of the picture as every viewer shows it.",
        "tests/unit/mends/test_mends_media.py",
        "base_processor._load_single_item: ImageOps.exif_transpose, and no decoding on the GPU of turned files.",
    ),
    Mend(
        "picture_modes",
        "Grey pictures of 16 or 32 bits or of floats become white or black, and transparent pixels show their hidden "
        "colour.",
        "Deeper grey is scaled to 8 bits, and transparent pixels are seen on white.",
        "tests/unit/mends/test_mends_media.py",
        "base_processor._load_single_item: scale the modes I and F, composite alpha on white.",
    ),
    Mend(
        "odd_sizes",
        "SGLang allocates a picture, the square around it, or the frames of a video without checking their size; a "
        "video less than 32 pixels across is an internal error.",
        "Sizes are checked before anything is decoded, and the error names size and limit; small videos work.",
        "tests/unit/mends/test_mends_media.py",
        "utils.common.load_image: limits on the header.",
    ),
    Mend(
        "video_frames",
        "A video given as single frames (data:video/jpeg, a list, an array) is an internal error, or has no timing.",
        "It is treated like a file of these frames, at the stated rate or 1 frame a second.",
        "tests/unit/mends/test_mends_media.py",
        "utils.common.load_video: a decoder over frames.",
    ),
    Mend(
        "video_options",
        "SGLang drops fps, max_frames, max_long_side_pixel and every other option of a single picture or video.",
        "Each family applies the options that it supports, and refuses the others by name.",
        "tests/unit/mends/test_mends_media.py",
        "base_processor._load_single_item: keep VideoData.preprocess_kwargs with the decoder.",
    ),
    Mend(
        "media_order",
        "InternVL's conversation template moves the pictures of a message before its text and its videos.",
        "Pictures stay where the message has them, as in OpenGVLab's own code.",
        "tests/unit/mends/test_mends_media.py",
        "parser/conversation.py: internvl-2-5 without image_token_at_prefix.",
    ),
    Mend(
        "media_of_samples",
        "With n > 1 SGLang refuses a request with several pictures, and each answer sees only one of several videos.",
        "Each answer sees all media of the request.",
        "tests/unit/mends/test_mends_media.py",
        "io_struct.GenerateReqInput._handle_parallel_sampling: wrap media as text is wrapped.",
    ),
    Mend(
        "sessions",
        "A turn of a session keeps all media of its parent even if its offset cuts some of them off, and the server "
        "ends. It also ends if a session is replaced or closed while a turn runs, if a turn with media names an "
        "unknown parent, or, with InternVL and others, if the history of a turn with media is no longer cached.",
        "A turn has the media before its offset. A medium that the offset cuts in two, or that was lost with an "
        "aborted turn, is a 400 that names it. History is found in the cache, or computed again.",
        "tests/server/test_sessions.py",
        "session_controller.Session.create_req: drop items after the offset, in a copy of the parent's media.",
    ),
    Mend(
        "item_checks",
        "SGLang does not check media that a client preprocessed (processor_output, precomputed_embedding): a missing "
        "grid, missing rows or values that are no numbers end the server.",
        "They are checked against the prompt and the model first, and refused with a sentence.",
        "tests/unit/families/test_item_checks.py",
        "base_processor.process_and_combine_mm_data: validate items of clients.",
    ),
    Mend(
        "unread_media",
        "SGLang's processors of some models read no video or no sound (MiniCPM-V 2.6 to 4.5, Gemma 3, LLaVA in its "
        "original form), and leave those of a request out without a word.",
        "The request is a 400 that names the kind of media and the model.",
        "tests/unit/families/test_unread_media.py",
        "base_processor: refuse media of a kind that the class does not list.",
    ),
    Mend(
        "request_fields",
        "A token id outside the vocabulary, an empty prompt, or a request for more log-probabilities than the "
        "vocabulary has tokens ends the server; a list of media whose length differs from the prompts' is a 500.",
        "Each is a 400 that names the field.",
        "tests/server/test_odd_fields.py",
        "TokenizerManager._validate_one_request: check input_ids against the vocabulary.",
    ),
    Mend(
        "aborts",
        "If a client aborts a request or disconnects while SGLang loads its media, the request still runs to its end.",
        "The request ends at once, and nothing of it reaches the scheduler.",
        "tests/server/test_aborts.py",
        "TokenizerManager.abort_request: cancel the task that prepares a request which is not dispatched yet.",
    ),
)


def named(name: str) -> Mend:
    """The mend with this name. Raises StopIteration if there is none."""
    return next(mend for mend in MENDS if mend.name == name)


class MendsError(ValueError):
    """`SGLANG_MMINFER_MENDS` holds something that is neither `all`, `none` nor names of mends."""


@functools.lru_cache
def _chosen(setting: str) -> frozenset[str]:
    """The names of the mends that a value of the setting leaves on.

    "" or "all": every mend. "none": no mend. "a,b": only these. "-a,-b": all except these.

    Raises:
        MendsError: naming the entry that is no name of a mend, or if names to keep and names to leave out are mixed.
    """
    names = frozenset(mend.name for mend in MENDS)
    entries = [entry.strip() for entry in setting.split(",") if entry.strip()]
    if entries in ([], [ALL]):
        return names
    if entries == [NONE]:
        return frozenset()
    if unknown := [entry for entry in entries if entry.removeprefix("-") not in names]:
        raise MendsError(
            f"{settings.MENDS.variable}: expected all, none, or names of mends ({', '.join(sorted(names))}), each with "
            f"a minus to leave it out; got {unknown[0]!r}"
        )
    excluded = frozenset(entry[1:] for entry in entries if entry.startswith("-"))
    if excluded and len(excluded) != len(set(entries)):
        raise MendsError(
            f"{settings.MENDS.variable}: expected names to keep, or names to leave out, not both; got {setting!r}"
        )
    return names - excluded if excluded else frozenset(entries)


def active(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the setting leaves a mend on and the installed SGLang has the fault.

    Args:
        name: a name in `MENDS`.
        environ: the environment; None for that of this process.

    Raises:
        MendsError: if the setting cannot be read.
    """
    if settings.SPLIT_VIDEOS.read(environ) == "0" and name in _FIRST:
        return False
    return name in _chosen(settings.MENDS.read(environ)) and _has_fault(named(name).versions)


def why_bad() -> str | None:
    """The error in SGLANG_MMINFER_MENDS as a sentence, None if the setting is right."""
    try:
        _chosen(settings.MENDS.read())
    except MendsError as error:
        return str(error)
    return None


_FIRST = frozenset(mend.name for mend in MENDS[:5])
"""The mends that SGLANG_MMINFER_SPLIT_VIDEOS switched before SGLANG_MMINFER_MENDS existed."""


def active_names() -> list[str]:
    """The names of the mends that are on, in the order of `MENDS`."""
    return [mend.name for mend in MENDS if active(mend.name)]


@functools.cache
def _has_fault(versions: str) -> bool:
    return settings.sglang_is_within(versions)


def wanted(server_args: Any) -> bool:
    """Whether a server's attention backend is mminfer, so that its media are mended.

    `serving.launch` notes the answer on the arguments as `_mminfer_wanted`. Before that the backend's fields decide.
    """
    if settings.SPLIT_VIDEOS.read() == "1":
        return True
    noted = getattr(server_args, "_mminfer_wanted", None)
    if noted is not None:
        return bool(noted)
    backends = (getattr(server_args, name, None) for name in _BACKEND_FIELDS)
    return settings.BACKEND_NAME in backends


def here(name: str) -> bool:
    """Whether a mend acts in this process. For hooks on SGLang's code that are not handed a server's arguments."""
    from sglang.srt.runtime_context import get_server_args

    return wanted(get_server_args()) and active(name)


_BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def page() -> str:
    """The text of docs/mends.md."""
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

"""Checks what a processor made of a request against its prompt, before it goes to the scheduler.

SGLang's scheduler ends if there are fewer embeddings than placeholders, and a processor's worker may never answer if a
prompt has more placeholders than media. With these checks both are errors of the client.

Items that a client preprocessed (`"format": "processor_output"` or `"precomputed_embedding"`) are checked for
everything that the family's encoder takes for granted; items of SGLang's own processor for their places only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from types import CodeType
from typing import Any

from sglang_mminfer import families, mends, releases
from sglang_mminfer.families.base import Family, MediaItem
from sglang_mminfer.families.maps import map_from_mm_inputs
from sglang_mminfer.mends.requests import media_in
from sglang_mminfer.mends.text_config import text_config_of
from sglang_mminfer.modality.items import GeometryError, modality_of, offsets_of

NAME = "item_checks"
UNREAD = "unread_media"

_OWN_PREFIX = "mminfer"
"""The prefix of those keys of `model_specific_data` that only this package writes."""


def check_placeholders(processor: Any, prompt: Any, request: Any) -> None:
    """Raises ValueError if a prompt has more or fewer placeholders than media, for families that can count them."""
    count = getattr(processor, "placeholders_in", None)
    if count is None or not isinstance(prompt, str):
        return
    for kind, found in count(prompt).items():
        media = media_in(request, kind)
        if any(processor._is_preprocessed_input(one) for one in media):
            continue  # the prompt may hold every token of such media; `check` compares them
        given = len(media)
        if found > given or (found < given and not getattr(processor, "adds_placeholders", False)):
            raise ValueError(
                f"prompt: expected one {kind} placeholder for each of the {given} {kind}s given, found {found}"
            )


def check_preprocessed(request: Any) -> None:
    """Raises ValueError for media that a client preprocessed but sent without a tensor: JSON, for one, has none."""
    import torch

    if not mends.active(NAME):
        return
    for kind in ("image", "video", "audio"):
        for one in media_in(request, kind):
            if not isinstance(one, dict):
                continue
            form = one.get("format")
            if form is None or str(getattr(form, "name", form)).upper() not in _FORMATS:
                continue
            features = [one[name] for name in _FEATURES if name in one]
            if len(features) != 1 or not isinstance(features[0], torch.Tensor):
                got = f"{len(features)} of them" if len(features) != 1 else type(features[0]).__name__
                raise ValueError(
                    f"{kind}_data: expected one feature, a tensor, in a {one['format']} (as {', '.join(_FEATURES)}), "
                    f"got {got}"
                )


_FORMATS = ("PROCESSOR_OUTPUT", "PRECOMPUTED_EMBEDDING")
_FEATURES = (
    *("feature", "pixel_values", "pixel_values_videos", "precomputed_embeddings"),
    *("audio_features", "input_features", "images"),
)


_MADE_OF = {"video": "VIDEO", "audio": "AUDIO"}
"""The modality of the items that a processor makes of each kind of media that some processors do not read."""


def check_read(output: Any, processor: Any, request: Any) -> None:
    """Raises ValueError for media of a kind of which the processor made nothing: it has left them out.

    Processors of models without a family may make items of another modality of a video, so theirs count as unread only
    if the class never mentions the request's media of that kind.
    """
    if not mends.active(UNREAD):
        return
    config = processor.hf_config
    made = {item.modality.name for item in (output.mm_items if output is not None else ())}
    for kind, modality in _MADE_OF.items():
        given = [one for one in media_in(request, kind) if one is not None]
        if not given or modality in made:
            continue
        if families.family_of(config) is not None or not mentions(type(processor), f"{kind}_data"):
            name = (getattr(config, "architectures", None) or [config.model_type])[0]
            raise ValueError(f"{kind}: expected none, because SGLang reads none for {name}, got {len(given)}")


def mentions(kind: type, name: str) -> bool:
    """Whether a method of the processor class `kind`, or of a class between it and SGLang's base, uses that name."""
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    own = [
        one for one in kind.__mro__ if issubclass(one, BaseMultimodalProcessor) and one is not BaseMultimodalProcessor
    ]
    codes = [method.__code__ for one in own for method in vars(one).values() if hasattr(method, "__code__")]
    while codes:
        code = codes.pop()
        if name in (*code.co_names, *code.co_varnames, *code.co_consts):
            return True
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
    return False


def check(output: Any, processor: Any) -> None:
    """Checks the items of a request.

    Args:
        output: SGLang's MultimodalProcessorOutput.
        processor: the media processor that made it.

    Raises:
        ValueError: for items that do not fit their prompt or the model.
    """
    if not mends.active(NAME) or output.input_ids is None:
        return
    length = len(output.input_ids)
    family = families.family_of(processor.hf_config)
    try:
        _check_places(output.mm_items, length)
        from_client = [(i, item) for i, item in enumerate(output.mm_items) if item.format.name != "NORMAL"]
        if from_client or (family is not None and not output.mm_items):
            _check_covered(output)
        for i, item in from_client:
            one = MediaItem(item, modality_of(item, i), f"mm_items[{i}] ({item.modality.name.lower()})")
            _check_features(one, family, processor.hf_config)
        if from_client:
            map_from_mm_inputs(output, length, None if family is None else family.geometry(processor.hf_config))
    except GeometryError as error:
        raise ValueError(f"media: {error}") from error
    positions = output.mrope_positions
    if positions is not None and tuple(positions.shape) != (3, length):
        raise ValueError(f"media: expected positions of 3 x {length} tokens, got {tuple(positions.shape)}")


def _check_places(items: Iterable[Any], length: int) -> None:
    """Checks that every span lies in the prompt and overlaps no other.

    Raises:
        GeometryError: naming the item.
    """
    spans = []
    for i, item in enumerate(items):
        name = f"mm_items[{i}] ({item.modality.name.lower()})"
        for first, last in offsets_of(item, name):
            if not 0 <= first <= last < length:
                raise GeometryError(
                    "out_of_range_offsets", f"{name}: expected offsets in a prompt of {length}, got ({first}, {last})"
                )
            spans.append((first, last, name))
    spans.sort()
    for (_, last, one), (first, _, other) in pairwise(spans):
        if first <= last:
            raise GeometryError("overlapping_offsets", f"{other} at {first}: overlaps {one}")


def _check_covered(output: Any) -> None:
    """Raises ValueError if a placeholder in the prompt belongs to no item."""
    ids = [int(token) for token in output.input_ids]
    covered = [False] * len(ids)
    for item in output.mm_items:
        for first, last in item.offsets or ():
            covered[first : last + 1] = [True] * (last + 1 - first)
    for kind, token in (("image", output.im_token_id), ("video", output.video_token_id)):
        left = [i for i, one in enumerate(ids) if one == token and not covered[i]] if token is not None else []
        if left:
            raise ValueError(
                f"prompt: expected media for every {kind} placeholder (token {token}), found {len(left)} more, the "
                f"first at token {left[0]}"
            )


# ---- what a client says that a processor or an encoder made -----------------------------------------------------


def _check_features(one: MediaItem, family: Family | None, hf_config: Any) -> None:
    """Raises ValueError for features that the model cannot take."""
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    item, name = one.item, one.label
    if own_keys := [key for key in item.model_specific_data if str(key).startswith(_OWN_PREFIX)]:
        raise ValueError(f"{name}: {own_keys[0]} is no field of a client's")
    pads = (item.pad_value, *releases.pad_values(item))
    if any(type(pad) is not int or not MM_PAD_SHIFT_VALUE <= pad < 1 << 63 for pad in pads):
        raise ValueError(f"{name}: expected a pad_value of at least {MM_PAD_SHIFT_VALUE}, got {item.pad_value!r:.40}")
    tokens = sum(last + 1 - first for first, last in offsets_of(item, name))
    embedded = item.format.name == "PRECOMPUTED_EMBEDDING"
    if item.precomputed_embeddings is not None:
        if item.feature is not None:
            raise ValueError(f"{name}: expected a feature or precomputed_embeddings, got both")
        embedded = True
    value = item.feature if item.precomputed_embeddings is None else item.precomputed_embeddings
    shape = _shape_of(value, name)
    if embedded:
        width = int(text_config_of(hf_config).hidden_size) if item.is_audio() else embedding_width(hf_config)
        if len(shape) < 2 or shape[-1] != width or math.prod(shape[:-1]) != tokens:
            raise ValueError(
                f"{name}: expected embeddings of {tokens} x {width} for its {tokens} tokens, got "
                f"{' x '.join(map(str, shape))}"
            )
        return
    if family is not None:
        family.check_features(one, shape, tokens, hf_config)


def _shape_of(value: Any, name: str) -> tuple[int, ...]:
    """The shape of a feature. Raises ValueError unless it is a tensor of finite floating-point numbers."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor as its feature, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a feature of floating-point numbers, got {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected a feature of finite numbers")
    return tuple(value.shape)


def embedding_width(hf_config: Any) -> int:
    """Numbers of a token's embedding of a picture or video: with Qwen3-VL those of its deepstack layers, too."""
    thinker = getattr(hf_config, "thinker_config", hf_config)
    deepstack = getattr(getattr(thinker, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return int(text_config_of(hf_config).hidden_size) * (1 + len(deepstack))

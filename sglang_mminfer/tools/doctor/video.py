"""`mminfer doctor --video F`: what a server would make of one video, without a GPU and without weights.

SGLang's own code prepares a chat request with the video up to the point where the scheduler would get it: arguments,
chat template, tokenizer manager, and the model's processor with its rules for sampling frames. So tokens and geometry
are those of a server. Memory and density are computed from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mminfer import settings
from sglang_mminfer.families import llava_original
from sglang_mminfer.families.item_checks import embedding_width
from sglang_mminfer.mends import media_cache, stages
from sglang_mminfer.serving import dense_backend, head_config_choice
from sglang_mminfer.serving.encoder_watch import ENVIRONMENT, MB, entries_of, suggested_mb, tokens_of
from sglang_mminfer.tools.doctor.finding import Finding, brief
from sglang_mminfer.tools.doctor.model import server_args_of

if TYPE_CHECKING:
    from sglang_mminfer.head_config import HeadConfig
    from sglang_mminfer.modality.segments import ModalityMap
    from sglang_mminfer.patterns.boundary import HeadPattern

QUESTION = "What happens in this video?"
SECTION = "this video"


@dataclass(frozen=True)
class VideoOptions:
    """The video, and the flags of the server that would get it.

    Attributes:
        path: the video file.
        mm_process_config: as SGLang's --mm-process-config; None: SGLang's defaults.
        chunked_prefill_size: as SGLang's --chunked-prefill-size, in tokens; None: what SGLang picks on this machine.
        time: measure how long this machine takes to prepare it.
    """

    path: str
    mm_process_config: dict[str, Any] | None = None
    chunked_prefill_size: int | None = None
    time: bool = False


class VideoError(ValueError):
    """The video cannot be examined. The message says why in one sentence, and `fix` says what to do."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.fix = fix


@dataclass(frozen=True)
class Prompt:
    """A chat request with the video and a short question, as it reaches the scheduler."""

    input_ids: list[int]
    mm_inputs: Any  # SGLang's MultimodalInputs
    turns: tuple[Preparation, ...] = ()
    """How long the first turn with the video and a later one took, if that was to be measured."""


@dataclass(frozen=True)
class Preparation:
    """What preparing the media of a request took.

    Attributes:
        times: up to where the scheduler gets them; None where no mend of ours sees it.
        hash_ms: hashing what it gets, which the scheduler does.
    """

    times: stages.MediaTimes | None
    hash_ms: float


def examine_video(
    model_path: str, config_name: str | None, options: VideoOptions, launch: Mapping[str, Any] | None = None
) -> Iterator[Finding]:
    """All findings about one video and one model; a single error if the video cannot be served."""
    try:
        yield from _findings(model_path, config_name, options, launch)
    except VideoError as error:
        yield Finding(SECTION, "video", "error", str(error), error.fix)


def _findings(
    model_path: str, config_name: str | None, options: VideoOptions, launch: Mapping[str, Any] | None
) -> Iterator[Finding]:
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    if not os.path.isfile(options.path):
        raise VideoError(f"{options.path}: no such file", "name a video file: mp4, mkv, webm, ...")
    fields = {
        name: value
        for name in ("mm_process_config", "chunked_prefill_size")
        if (value := getattr(options, name)) is not None
    }
    try:
        server_args = server_args_of(model_path, config_name, **(launch or {}), **fields)
    except Exception as error:
        raise VideoError(
            f"not looked at, because no server would start: {brief(error)}", "mend that first; see the section before."
        ) from None
    model, view = model_config_of(server_args), resolving_view(server_args)
    architecture = (model.hf_config.architectures or ["this model"])[0]
    if not model.is_multimodal:
        raise VideoError(f"{architecture} takes no images or video", "name a vision-language model.")
    if architecture in llava_original.ARCHITECTURES:
        raise VideoError(f"{architecture} takes images, and SGLang no video for it", "name a model that takes video.")
    frames, fps = _file(options.path)
    prompt = prompt_of(server_args, options.path, timed=options.time)
    sampled = json.dumps(options.mm_process_config) if options.mm_process_config else "none, so SGLang's defaults"
    yield Finding(SECTION, "file", "ok", f"{frames} frames, {fps:.4g} a second; --mm-process-config: {sampled}")
    yield from _tokens(prompt, model)
    yield _embeddings(prompt, model, view)
    yield _kv_cache(len(prompt.input_ids), model, view)
    yield _density(prompt, model, server_args, view.device)
    yield from _times(prompt.turns)


def _file(path: str) -> tuple[int, float]:
    """The number of frames, and frames per second, as SGLang's decoder reads them.

    Raises:
        VideoError: the file cannot be decoded.
    """
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    try:
        video = VideoDecoderWrapper(path)
        if not len(video):
            raise ValueError("it has no frames")
        return len(video), float(video.avg_fps)
    except ImportError:
        raise
    except Exception as error:  # each decoder has error types of its own
        raise VideoError(
            f"{path}: not a video that can be decoded ({os.path.getsize(path)} bytes): {brief(error)}",
            "convert it with FFmpeg, or name another file.",
        ) from None


def prompt_of(server_args: Any, path: str, timed: bool = False) -> Prompt:
    """A chat request with the video at `path`, prepared by SGLang's own code in this process.

    Args:
        timed: prepare it twice more and measure that, first with nothing kept and then as a later turn.

    Raises:
        VideoError: if SGLang refuses it, or drops the video on the way.
    """
    from sglang.srt.entrypoints.engine import init_tokenizer_manager
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.managers.schedule_batch import MultimodalInputs
    from sglang.srt.parser.template_detection import resolve_auto_parsers
    from sglang.srt.runtime_context import publish, restore_context, snapshot_context
    from sglang.srt.server_args import PortArgs

    content = [{"type": "video_url", "video_url": {"url": path}}, {"type": "text", "text": QUESTION}]
    request = ChatCompletionRequest(model="doctor", messages=[{"role": "user", "content": content}], max_tokens=1)
    resolve_auto_parsers(server_args)
    with contextlib.ExitStack() as stack:
        stack.callback(restore_context, snapshot_context())
        publish(server_args, role="tokenizer")
        ports = PortArgs.init_new(server_args)
        stack.callback(_remove_sockets, ports)
        manager, templates = init_tokenizer_manager(server_args, ports)
        for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler):
            stack.callback(socket.close, 0)
        try:
            chat = manager.serving_chat_class(manager, templates)

            def prepare() -> tuple[Any, Any, Preparation]:
                internal_request, _ = chat._convert_to_internal_request(request)
                tokenized = asyncio.run(_tokenized(manager, internal_request))
                begin = time.perf_counter()
                mm_inputs = tokenized.mm_inputs and MultimodalInputs.from_processor_output(tokenized.mm_inputs)
                hash_ms = 1e3 * (time.perf_counter() - begin)
                return tokenized, mm_inputs, Preparation(stages.times_of(internal_request.rid), hash_ms)

            tokenized, mm_inputs, _ = prepare()
            media_cache.of_process().clear()
            turns = tuple(prepare()[2] for _ in range(2 if timed else 0))
        except Exception as error:
            raise VideoError(
                f"SGLang refuses a request with it: {brief(error)}",
                "a server would answer the same; give a shorter video, another --mm-process-config or another model.",
            ) from None
        architecture = (manager.model_config.hf_config.architectures or ["this model"])[0]
        if mm_inputs is None or not any(item.is_video() or item.is_image() for item in mm_inputs.mm_items):
            raise VideoError(
                f"SGLang makes no media of it: its chat template or processor for {architecture} takes no video",
                "name a model that takes video, or its --chat-template.",
            )
        return Prompt(list(tokenized.input_ids), mm_inputs, turns)


async def _tokenized(manager: Any, request: Any) -> Any:
    """What the tokenizer manager would send to the scheduler. The steps are the manager's own."""
    request.normalize_batch_and_arguments()
    manager._init_req_state(request)
    return await manager._tokenize_one_request(request)


def _remove_sockets(ports: Any) -> None:
    """Remove the socket files over which a server's processes would talk to each other."""
    for name in vars(ports).values():
        if isinstance(name, str) and name.startswith("ipc://"):
            Path(name.removeprefix("ipc://")).unlink(missing_ok=True)


def map_of(prompt: Prompt, model: Any) -> ModalityMap:
    """The prompt's map, read as the backend reads it.

    Raises:
        GeometryError: the media do not add up; a server would run the request dense.
    """
    from sglang_mminfer.families.maps import map_from_mm_inputs, reader_of

    return map_from_mm_inputs(prompt.mm_inputs, len(prompt.input_ids), reader_of(model.hf_config))


def _tokens(prompt: Prompt, model: Any) -> Iterator[Finding]:
    from sglang_mminfer.families.maps import GeometryError

    total, media = len(prompt.input_ids), tokens_of(prompt.mm_inputs.mm_items)
    yield Finding(
        SECTION,
        "tokens",
        "ok",
        f"{total:,} in a prompt with it and one question: {media:,} of media, {total - media} text",
    )
    try:
        modality_map = map_of(prompt, model)
    except GeometryError as error:
        yield Finding(SECTION, "grid", "warning", f"requests with it run dense: {error}", "report it, please.")
        return
    shapes: Counter[tuple[int, int]] = Counter()
    for segment in modality_map.segments:
        if segment.grid is not None:
            shapes[segment.grid.shape] += segment.grid.frames
    if shapes:
        grids = ", ".join(f"{frames} frames of {rows} x {cols}" for (rows, cols), frames in shapes.items())
        yield Finding(SECTION, "grid", "ok", f"{grids} tokens, after what the model merges")
    else:
        yield Finding(SECTION, "grid", "note", "not known for this model: only where the video begins and ends")


def _times(turns: tuple[Preparation, ...]) -> Iterator[Finding]:
    if not turns:
        return
    first, later = turns
    if first.times is None or later.times is None:
        yield Finding(SECTION, "time", "note", "not measured: no mend of this package acts on this model's media")
        return
    yield Finding(SECTION, "time, first turn", "ok", _shown(first))
    kept = media_cache.of_process().report()
    how = (
        f"with {kept.bytes / MB:.0f} of {kept.limit / MB:.0f} MB kept for it ({settings.MEDIA_CACHE_MB.variable})"
        if kept.bytes
        else f"nothing of it is kept, {settings.MEDIA_CACHE_MB.variable} allows {kept.limit / MB:.0f} MB"
    )
    yield Finding(SECTION, "time, later turns", "ok", f"{_shown(later)}; {how}")
    yield Finding(
        SECTION,
        "time, not here",
        "note",
        "transfer, vision encoder and prefill need the server: encode_ms and forward_ms in its trace",
    )


def _shown(turn: Preparation) -> str:
    assert turn.times is not None
    names = {"open_ms": "fetch, hash, open", "decode_ms": "decode", "resize_ms": "resize", "process_ms": "preprocess"}
    parts = [f"{words} {getattr(turn.times, name):.0f}" for name, words in names.items()]
    return f"{turn.times.prepare_ms + turn.hash_ms:.0f} ms: {', '.join(parts)}, hash features {turn.hash_ms:.0f}"


def _chunk_size(model: Any, view: Any) -> int | None:
    """The largest prefill chunk, in tokens; None if SGLang does not cut prompts."""
    from sglang.srt.configs.model_config import ModelImpl
    from sglang.srt.model_loader.utils import get_resolved_model_impl

    size = view.chunked_prefill_size
    if size is None or size <= 0 or get_resolved_model_impl(model) == ModelImpl.TRANSFORMERS:
        return None  # SGLang does not cut prompts of its Transformers fallback
    return size


def embedding_bytes(model: Any) -> int:
    """Bytes of one token in SGLang's embedding cache."""
    return embedding_width(model.hf_config) * model.dtype.itemsize


def _embeddings(prompt: Prompt, model: Any, view: Any) -> Finding:
    from sglang.srt.environ import envs

    chunk, per_token = _chunk_size(model, view), embedding_bytes(model)
    items = [item for item in prompt.mm_inputs.mm_items if item.offsets]
    total, limit = tokens_of(items) * per_token, int(envs.SGLANG_VLM_CACHE_SIZE_MB.get())
    size = f"{total / MB:.1f} MB of embeddings in {model.dtype}, cache of {limit} MB ({ENVIRONMENT})"
    cut = f"prefill in chunks of {chunk:,}" if chunk else "prefill not in chunks"
    refused = [entry for _, entry in entries_of(items) if tokens_of(entry) * per_token > limit * MB]
    runs = max((chunks_of(entry, chunk) for entry in refused), default=1)
    if runs == 1:
        return Finding(SECTION, "vision encoder", "ok", f"{size}, {cut}: encoded once")
    return Finding(
        SECTION,
        "vision encoder",
        "warning",
        f"{size}, {cut}: the cache refuses it, and the vision encoder runs {runs} times in place of once",
        f"set {ENVIRONMENT}={suggested_mb(total)} for the server, which leaves that much less for the KV cache.",
    )


def chunks_of(items: list[Any], chunk: int | None) -> int:
    """How many chunks hold tokens of these items, if the prompt is prefilled from its start.

    Args:
        chunk: tokens of a chunk; None: the prompt is not cut.
    """
    if chunk is None:
        return 1
    spans = [span for item in items for span in item.offsets]
    return len({number for start, last in spans for number in range(start // chunk, last // chunk + 1)})


def _kv_cache(tokens: int, model: Any, view: Any) -> Finding:
    from sglang_mminfer.head_config import fingerprint_of

    element = {"fp8": 1, "bf1": 2, "bfl": 2}.get(str(view.kv_cache_dtype)[:3], model.dtype.itemsize)
    heads = model.get_total_num_kv_heads() * (model.head_dim + model.v_head_dim)
    size = tokens * len(fingerprint_of(model.hf_config).attention_layers) * heads * element
    shown = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / MB:.1f} MB"
    return Finding(SECTION, "KV cache", "ok", f"{shown} for this prompt, over all ranks ({view.kv_cache_dtype})")


def expected_density(modality_map: ModalityMap, head_config: HeadConfig, layers: int) -> float:
    """Visited over causal pairs, mean over all heads of all layers. What estimated patterns visit is known only when
    they run; here they count with what they visit on other models."""
    from sglang_mminfer.planning.cost import ChunkRows, dense_pairs
    from sglang_mminfer.planning.planner import is_static
    from sglang_mminfer.tools.baselines import density_of

    below, length = head_config.defaults.dense_below, modality_map.length
    heads = Counter(pattern for layer in range(layers) for pattern in head_config.patterns(layer))
    rows = ChunkRows(modality_map, 0, length, below)

    def density(head: HeadPattern) -> float:
        if is_static(head):
            return density_of(head, modality_map, below)
        return min(rows.visited_pairs(head) / dense_pairs(0, length, ""), 1.0)

    densities = {pattern: density(pattern) for pattern in heads}
    return sum(densities[pattern] * count for pattern, count in heads.items()) / heads.total()


def _density(prompt: Prompt, model: Any, server_args: Any, device: str) -> Finding:
    import torch

    from sglang_mminfer.families.maps import GeometryError
    from sglang_mminfer.kernels import executors
    from sglang_mminfer.planning.tiles import BLOCK_K
    from sglang_mminfer.serving.served_heads import Placement, ServedHeads

    head_config, named = head_config_choice.load_for_model(server_args, model.hf_config)
    layers, name = model.num_hidden_layers, f"{named.name}  [{named.source}]"
    try:
        modality_map = map_of(prompt, model)
    except GeometryError as error:
        return Finding(SECTION, "density", "note", f"1 ({error.reason}: runs dense), {name}")
    executor = executors.name_for(settings.executor(), torch.device(device), model.head_dim, BLOCK_K, model.dtype)
    backend = dense_backend.dense_backend_name(server_args, device)
    served = ServedHeads(head_config, Placement(0, torch.device(device), model.head_dim, executor, backend))
    if served.all_dense:
        return Finding(SECTION, "density", "note", f"1 (dense_config), {name}")
    choice = served.choice
    reason = choice.why_dense(modality_map, 0, modality_map.length, modality_map.length)
    if reason is not None:
        why = f"short: dense up to {choice.dense_below:,} tokens" if reason == "short" else reason
        return Finding(SECTION, "density", "note", f"1 ({why}), {name}")
    density = expected_density(modality_map, served.head_config, layers)
    return Finding(SECTION, "density", "ok", f"{density:.3f} of what dense attention computes, {name}")

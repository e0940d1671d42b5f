"""Sends a server the built-in clip before its first request, from the process that has the tokenizer.

All ways into a server (HTTP in its many dialects, gRPC, an Engine) end in TokenizerManager.generate_request. The first
request there sends the clip as a chat of its own, to every data-parallel replica, and waits for the answers; so do all
requests that come meanwhile. The schedulers know the clip by its request id (`calibration`). If no size of it works,
they are told so by another one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator
from typing import Any

from sglang_mminfer import releases, settings
from sglang_mminfer.mends import batches
from sglang_mminfer.serving import basis_choice, media_root

logger = logging.getLogger(__name__)

CLIP_RID = "mminfer-basis-clip"
"""With which the request ids of the clip begin."""

NO_CLIP_RID = "mminfer-basis-none"
"""With which the request id begins that says: no clip will come."""

CACHE_SALT = "mminfer-basis"
"""The salt of the clip in the radix cache, so that no conversation of a user's begins with what is cached of it."""

MOST_SECONDS = 240.0
"""After which the clip is given up: SGLang ends an HTTP server whose warm-up takes 10 minutes, or what
SGLANG_WARMUP_TIMEOUT says, and the clip is a part of that."""


class _Sending:
    """The clip on its way. Made in the event loop of the first request; others may run in other loops.

    Attributes:
        done: when requests may go on.
    """

    def __init__(self, manager: Any) -> None:
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A task of its own: the clip goes on if the client of the first request leaves.
        self._task = asyncio.ensure_future(_send(manager))
        self._task.add_done_callback(self._go_on)

    def _go_on(self, task: asyncio.Task[None]) -> None:
        self.done.set_result(None)


_sending: weakref.WeakKeyDictionary[Any, _Sending] = weakref.WeakKeyDictionary()
"""For each TokenizerManager that has had a request."""


def generate_request(original: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND TokenizerManager.generate_request: a request that names a forbidden file is refused (`media_root`), the
    clip goes before the first request, and the media of a request that wants several answers are kept together
    (`mends.batches`)."""
    if refusal := media_root.refused(self.server_args, obj):
        return refusal
    responses = batches.generate_request(original, self, obj, *args, **kwargs)
    sending = _sending.get(self)
    is_done = sending is not None and sending.done.done()
    if not basis_choice.is_awaited(self.server_args) or is_done or _passes(obj):
        return responses
    return _after_clip(responses, self)


def _passes(obj: Any) -> bool:
    """Whether a request need not wait: our own, and SGLang's probes of health, which must be answered in time."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    rid = getattr(obj, "rid", None)
    return isinstance(rid, str) and rid.startswith((CLIP_RID, NO_CLIP_RID, HEALTH_CHECK_RID_PREFIX))


async def _after_clip(responses: Any, manager: Any) -> AsyncIterator[Any]:
    async with contextlib.aclosing(responses):
        if manager not in _sending:
            _sending[manager] = _Sending(manager)
        await asyncio.shield(asyncio.wrap_future(_sending[manager].done))
        async for response in responses:
            yield response


async def _send(manager: Any) -> None:
    """Sends the clip, in the first size that the server takes. Never raises."""
    seconds = _most_seconds()
    try:
        why = await asyncio.wait_for(_clip(manager), seconds)
    except TimeoutError:
        why = f"it was not done after {seconds:.0f} s"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if why is None:
        return
    logger.warning(
        "mminfer: the built-in clip could not be computed, so heads choose keys by q . k itself, which is slower than "
        "by a basis; `mminfer basis` makes a file for %s. The server said: %s",
        settings.BASIS.variable,
        why,
    )
    try:
        await asyncio.wait_for(_no_clip(manager), seconds)
    except Exception as error:
        logger.warning("mminfer: the schedulers wait for the built-in clip in vain, and run dense: %s", error)


def _most_seconds() -> float:
    from sglang.srt.environ import envs

    warmup = envs.SGLANG_WARMUP_TIMEOUT.get()
    return min(MOST_SECONDS, 0.4 * warmup) if warmup > 0 else MOST_SECONDS


async def _clip(manager: Any) -> str | None:
    """Computes the clip once on each replica. Returns None, or why even its smallest size failed."""
    from sglang.srt.parser.template_manager import TemplateManager
    from sglang.srt.runtime_context import get_model, get_serving

    from sglang_mminfer.serving import clip

    templates = TemplateManager()
    templates.initialize_templates(
        tokenizer_manager=manager,
        model_path=get_model().model_path,
        chat_template=get_serving().chat_template,
        completion_template=get_serving().completion_template,
    )
    chat, loop, why = manager.serving_chat_class(manager, templates), asyncio.get_running_loop(), None
    for number, size in enumerate(clip.SIZES):
        messages = await loop.run_in_executor(None, clip.messages, size)
        asked = (_ask(chat, messages, f"{CLIP_RID}-{number}", replica) for replica in _replicas())
        why = next(filter(None, await asyncio.gather(*asked)), None)
        if why is None:
            return None
    return why


async def _ask(chat: Any, messages: list[dict[str, Any]], rid: str, replica: int | None) -> str | None:
    """Computes the clip on a replica. Returns None, or why not."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(
        model=chat.tokenizer_manager.served_model_name,
        messages=messages,
        max_tokens=1,
        temperature=0.0,
        rid=f"{rid}-{replica or 0}",
        cache_salt=CACHE_SALT,
        routed_dp_rank=replica,
    )
    response = await chat.handle_request(request, None)
    if getattr(response, "status_code", 200) == 200:
        return None
    return bytes(response.body).decode(errors="replace")[:500]


async def _no_clip(manager: Any) -> None:
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

    kind = GenerateReqInput if manager.is_generation else EmbeddingReqInput

    async def tell(replica: int | None) -> None:
        rid = f"{NO_CLIP_RID}-{replica or 0}"
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        obj = kind(rid=rid, input_ids=[0], sampling_params=sampling, log_metrics=False)
        obj.routed_dp_rank = replica
        async for _ in manager.generate_request(obj, None):
            pass

    await asyncio.gather(*map(tell, _replicas()))


def _replicas() -> list[int | None]:
    """The data-parallel replicas to which a request can be sent; [None] if there is one."""
    count = releases.dp_ranks()
    return list(range(count)) if count > 1 else [None]

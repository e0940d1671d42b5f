"""A look inside SGLang's scheduler: a plugin for SGLang that writes JSON lines about each batch.

`install` makes a distribution of it, which a server finds on its PYTHONPATH.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "SGLANG_MMINFER_TEST_PROBE"

_owner: dict[int, tuple[int, int]] = {}
"""By KV slot: the position and token that were last written there. A generated token is -1."""


def install(folder: Path) -> str:
    """Makes the distribution in `folder`. Returns the PYTHONPATH of a server that loads the probe."""
    return distribution(folder, "probe")


def distribution(folder: Path, module: str) -> str:
    """Makes a distribution of `module`, which is beside this file and has `register`, as a plugin for SGLang."""
    info = folder / f"sglang_mminfer_{module}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang-mminfer-{module}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{module} = {module}:register\n")
    return f"{folder}{os.pathsep}{Path(__file__).parent}"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    batch = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
    HookRegistry.register(batch, look, HookType.AFTER)
    native = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    HookRegistry.register(f"{native}.init_forward_metadata", planned, HookType.BEFORE)
    HookRegistry.register(f"{native}.forward_extend", attended, HookType.BEFORE)


def look(result: Any, cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """AFTER ForwardBatch.init_new: does index p of a request's row hold the slot of position p, for all earlier p?"""
    if result.forward_mode.is_idle():
        return
    table = model_runner.req_to_token_pool.req_to_token
    slots, extends = result.out_cache_loc.tolist(), not result.forward_mode.is_decode()
    lengths = list(result.extend_seq_lens_cpu) if extends else [1] * len(batch.reqs)
    row_start = 0
    for i, (request, length) in enumerate(zip(batch.reqs, lengths)):
        seq_len = int(result.seq_lens_cpu[i])
        prefix, prompt = seq_len - length, list(request.origin_input_ids)
        row = table[result.req_pool_indices[i], :seq_len].tolist()
        new = slots[row_start : row_start + length]
        tokens = [prompt[p] if p < len(prompt) else -1 for p in range(seq_len)]
        wrong = [p for p in range(prefix) if _owner.get(row[p]) not in ((p, tokens[p]), (p, -1))]
        if extends:
            _tell(
                kind="batch",
                mode=batch.forward_mode.name,
                rid=request.rid,
                prefix=prefix,
                length=length,
                prompt=len(prompt),
                media=result.mm_inputs is not None and result.mm_inputs[i] is not None,
                wrong=wrong,
                new_in_place=row[prefix:] == new,
                retracted=request.retraction_count,
            )
        for position, slot in zip(range(prefix, seq_len), new):
            _owner[slot] = position, tokens[position]
        row_start += length


def planned(self: Any, forward_batch: Any) -> None:
    """BEFORE init_forward_metadata: which requests of the batch have media."""
    if forward_batch.forward_mode.is_extend():
        media = forward_batch.mm_inputs
        _tell(
            kind="metadata",
            mode=forward_batch.forward_mode.name,
            lengths=list(forward_batch.extend_seq_lens_cpu),
            rids=forward_batch.rids,
            media=[] if media is None else [found is not None for found in media],
        )


def attended(self: Any, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE forward_extend: whether the batch still has media at its first layer."""
    if layer.layer_id == 0:
        _tell(kind="layer", media_left=any(media is not None for media in forward_batch.mm_inputs or ()))


def _tell(**what: Any) -> None:
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps(what) + "\n")

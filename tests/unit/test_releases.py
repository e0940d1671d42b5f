"""What `releases` finds in every release of SGLang, with the one that is installed."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
from sglang.srt.mem_cache.memory_pool import unwrap_write_loc
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from sglang_mminfer import plugin, releases
from sglang_mminfer.serving import cpu_platform
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl


def test_tokens_of_media_become_keys_of_the_cache() -> None:
    items = [
        MultimodalDataItem(modality=Modality.IMAGE, offsets=[(1, 2)], pad_value=1001, hash=1),
        MultimodalDataItem(modality=Modality.VIDEO, offsets=[(4, 5)], pad_value=1002, hash=2),
    ]
    media = MultimodalInputs(mm_items=items, im_token_id=7, video_token_id=8)
    ids = array("q", [1, 7, 7, 2, 8, 8, 3])
    assert list(releases.pad_mm_tokens(ids, media)) == [1, 1001, 1001, 2, 1002, 1002, 3]
    assert list(ids) == [1, 7, 7, 2, 8, 8, 3]


def test_keys_and_values_are_written_where_the_batch_says() -> None:
    slots = torch.tensor([3, 5, 8])
    batch = SimpleNamespace(out_cache_loc=slots, out_cache_loc_is_physical=True)
    loc = releases.kv_write_loc(batch, SimpleNamespace(is_cross_attention=False))
    assert unwrap_write_loc(loc)[0] is slots


def test_the_platform_claims_nothing() -> None:
    capabilities = releases.platform_capabilities()
    assert capabilities is None or not any(getattr(capabilities, name) for name in type(capabilities).__struct_fields__)
    assert cpu_platform.MMInferCpuPlatform().device_type == "cpu"


@pytest.mark.parametrize("fields, shards", [({}, False), ({"enable_kv_cache_sharding": True}, True)])
def test_a_release_without_sharding_does_not_shard(fields: dict[str, bool], shards: bool) -> None:
    assert releases.shards_kv_cache(SimpleNamespace(**fields)) is shards


@pytest.mark.parametrize(
    "hook", [hook for hook in plugin.HOOKS if hook.formerly], ids=lambda hook: hook.target.rpartition(".")[2]
)
def test_a_hook_that_has_moved_has_one_place(hook: plugin.Hook) -> None:
    assert [place.target_exists() for place in hook.at_each_place()].count(True) == 1


@pytest.mark.parametrize("fields, ranks", [({}, 1), ({"dp_size": 2}, 2)])
def test_every_replica_is_counted(tmp_path: Path, fields: dict[str, int], ranks: int) -> None:
    model = make_tiny_qwen2_5_vl(tmp_path)
    load_plugins()
    before = runtime_context.snapshot_context()
    runtime_context.publish(ServerArgs(model_path=str(model), device="cpu", **fields), role="tokenizer")
    try:
        assert releases.dp_ranks() == ranks
    finally:
        runtime_context.restore_context(before)

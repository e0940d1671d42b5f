"""What the demo writes of an answer: everything in its prefill records is JSON, the map and the audit too."""

import json

from demo import Answer
from sglang_mminfer.serving.trace import LayerAudit, MapEntry, PrefillRecord


def test_an_answer_with_all_that_a_trace_may_hold_is_json():
    audit = {name: 0 for name in LayerAudit.__struct_fields__}
    record = PrefillRecord(
        rid="a",
        prefix_len=0,
        chunk_len=4,
        seq_len=4,
        segments=1,
        sparse_layers=1,
        density=0.5,
        dense_reason=None,
        plan_ms=1.0,
        attn_ms=1.0,
        forward_ms=1.0,
        map=[MapEntry(modality="video", start=0, stop=4, grid=(1, 2, 2))],
        audit=[LayerAudit(**audit)],
    )
    answer = Answer("x", [1], [-0.1], [1, 2, 3, 4], 4, 0, 0.1, 0.2, "a", [record])
    (prefill,) = json.loads(json.dumps(answer.to_json()))["prefills"]
    assert prefill["density"] == 0.5 and prefill["map"][0]["grid"] == [1, 2, 2] and "rid" not in prefill

"""Every `dense_reason` in the trace and the metrics, and when it is counted. Tests produce each of them."""

from __future__ import annotations

REASONS: dict[str, str] = {
    # reasons of a request
    "no_media": "text-only requests",
    "short": "every row lies below `dense_below` of the config",
    "decode": "generated tokens, which see everything; as prefill they come in mixed chunks and after retractions",
    "dense_config": "every head of the config is dense",
    "no_raster": "media without a known raster, and a config that leaves no key out without one",
    "plan_budget": "a chunk whose plan would take longer or more memory than the budget: thousands of small images",
    "no_basis": "requests before the basis of the heads is there: at the start of a server, the built-in clip itself",
    "not_faster": "a chunk for which dense attention is estimated to be as fast: a prompt that is too short, text rows "
    "that see everything, windows as wide as the prompt",
    "no_prompt_length": "SGLang did not say how long the prompt is",
    # media that do not add up; the log names the item
    "no_offsets": "an item without offsets",
    "bad_offsets": "offsets that are not pairs of numbers",
    "empty_span": "offsets that end before they begin",
    "out_of_range_offsets": "offsets beyond the prompt",
    "overlapping_offsets": "media that overlap",
    "moving_offsets": "video tokens that are dropped while they are embedded (EVS)",
    "grid_mismatch": "a grid that does not fit its tokens",
    "zero_frames": "a grid without frames",
    "unreadable": "an item that no family's reader understands",
    "unknown_modality": "an item that is neither image nor video nor audio",
    # reasons of a batch or a server
    "mode_*": "modes that are not plain prefill; mode_target_verify, which verifies drafts, is in no trace",
    "two_batch_overlap": "batches that SGLang computes in two overlapping parts",
    "kv_cache_dtype": "a KV cache that no executor reads here, which start-up logs, or with scales of unknown use",
    "executor_failed": "the executor was wrong or failed in the check at start-up, or failed repeatedly since",
    "internal_error": "a defect of ours; the log has the traceback, the answer is the dense one",
    # reasons of layers, for a request without a sparse layer
    "layer_dense_config": "every head of the layer is dense",
    "layer_not_causal": "cross-attention or attention of an encoder",
    "layer_sliding_window": "a window of the model's own, or a prompt in pieces (Muse Spark)",
    "layer_modified_softmax": "a logit cap, attention sinks and the like",
    "layer_custom_mask": "a mask of the model's own",
    "layer_unequal_head_dims": "keys and values of unequal width",
    "layer_unknown": "a layer that the config has no entry for",
    "padded_rows": "a batch with rows that belong to no request",
    "no_layer": "a batch that reached no attention layer",
}
"""`mode_*` stands for one reason for each mode. Several reasons of layers are joined by commas."""

"""Every `dense_reason` of the trace and the metrics, and when it is counted. A test produces each."""

from __future__ import annotations

REASONS: dict[str, str] = {
    # of a request
    "no_media": "text-only requests",
    "short": "every row lies below `dense_below` of the config",
    "decode": "generated tokens, which see everything; as prefill they come in mixed chunks and after retractions",
    "dense_config": "every head of the config is dense",
    "no_raster": "media whose raster nobody told, and a config that leaves nothing out without it",
    "plan_budget": "a chunk whose plan would take longer or more memory than the budget: thousands of small images",
    "no_prompt_length": "SGLang did not say how long the prompt is",
    # of media that do not add up; the log says which
    "no_offsets": "an item without offsets",
    "bad_offsets": "offsets that are no pairs of numbers",
    "empty_span": "offsets that end before they begin",
    "out_of_range_offsets": "offsets beyond the prompt",
    "overlapping_offsets": "media that overlap",
    "moving_offsets": "video tokens that are dropped while they are embedded (EVS)",
    "grid_mismatch": "a grid that does not fit its tokens",
    "zero_frames": "a grid without frames",
    "unreadable": "an item that holds what no reader of media can make sense of",
    "unknown_modality": "an item that is no image, video or audio",
    # of a batch or a server
    "mode_*": "speculative and other modes that are no plain prefill",
    "two_batch_overlap": "batches that SGLang computes in two overlapping parts",
    "kv_cache_dtype": "a KV cache of another dtype than the model's (fp8); said at start-up",
    "executor_failed": "the executor was wrong or failed when it was checked at start-up, or failed again and again",
    "internal_error": "a defect of ours; the log has the traceback, the answer is the dense one",
    # of layers, for a request of which no layer ran sparse
    "layer_dense_config": "every head of the layer is dense",
    "layer_not_causal": "cross-attention or attention of an encoder",
    "layer_sliding_window": "a window of the model's own",
    "layer_modified_softmax": "a logit cap, attention sinks and the like",
    "layer_custom_mask": "a mask of the model's own",
    "layer_unequal_head_dims": "keys and values of unequal width",
    "layer_unknown": "a layer that the config does not count",
    "padded_rows": "rows that no request owns",
    "no_layer": "a batch of which no attention layer came by",
}
"""`mode_*` stands for a name for each mode. Several reasons of layers are joined by commas."""

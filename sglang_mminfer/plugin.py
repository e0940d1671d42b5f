"""The entry point, and every place where this package reaches into SGLang.

`HOOKS` lists each of those places with its reason. Nothing else in the package changes SGLang, but for a client that
imports `sglang_mminfer.frontend`, whose `PATCHES` are its own. Importing this module costs nothing: SGLang does so in
every process, and hides a plugin that fails to import behind "invalid choice: 'mminfer'".
"""

from __future__ import annotations

import functools

from sglang_mminfer.serving import cpu_platform, hooks
from sglang_mminfer.serving.hooks import Hook

HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.arg_groups.choices.ATTENTION_BACKEND_CHOICES",
        "choice",
        "sglang_mminfer.serving.backend_entry:add_choice",
        "argparse accepts an attention backend only by this list.",
        essential=True,
        when=("load",),
    ),
    Hook(
        "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS",
        "backend",
        "sglang_mminfer.serving.backend_entry:create_backend",
        "The scheduler builds attention backends by name from this registry.",
        essential=True,
        when=("load",),
    ),
    Hook(
        "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper",
        "around",
        "sglang_mminfer.serving.backend_entry:wrap",
        "On Blackwell SGLang lets some backends alone, by their names, stand beside gated delta nets.",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "after",
        "sglang_mminfer.serving.flags:add_cli_args",
        "The flags whose names begin with --mminfer; SGLang has no way for a plugin to declare one.",
        when=("load",),
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "around",
        "sglang_mminfer.serving.flags:from_cli_args",
        "ServerArgs takes only its own fields from the command line; this carries the flags over.",
        when=("load",),
    ),
    Hook(
        "handle_model_specific_adjustments",
        "resolution",
        "sglang_mminfer.serving.launch:check_launch",
        "Refuses what can never work and finds a bad head config before a process is started; names a draft "
        "backend for speculative decoding. This step is the first that knows flags, CUDA graphs and model, "
        "and comes before SGLang's own checks by backend name.",
        essential=True,
        when=("load",),
    ),
    Hook(
        "handle_model_capability_adjustments",
        "resolution",
        "sglang_mminfer.serving.launch:check_result",
        "Some models make SGLang replace the attention backend; that must not go unseen.",
        essential=True,
        when=("load",),
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.resolve_once",
        "before",
        "sglang_mminfer.serving.hooks:note",
        "Hooks on SGLang's model code are given no arguments of the server, and must leave servers without mminfer "
        "alone. Every process resolves or publishes its arguments before, and both go through this method.",
        essential=True,
        when=("load",),
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        "sglang_mminfer.serving.prompts:note",
        "A forward batch does not tell where a request's prompt ends and what was generated begins, and its mode does "
        "not either. The requests do, and this is the last place that has them.",
        essential=True,
    ),
    Hook(
        "sglang.srt.managers.cache_controller.storage_model_name",
        "after",
        "sglang_mminfer.serving.head_config_choice:storage_model_name",
        "Pages in HiCache's storage outlive a server and are shared between servers by the model's name, and the KV of "
        "sparse layers is another one for each head config.",
        since="0.5.22",
    ),
    Hook(
        "sglang.srt.managers.mm_schedule.get_embedding_and_mask",
        "around",
        "sglang_mminfer.serving.encoder_watch:watch_encoder",
        "SGLang's embedding cache silently refuses a video that is larger than the cache, and the vision encoder "
        "then runs again for every chunk: this sees it, says what to set, and counts it. Nothing else changes.",
    ),
    Hook(
        "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor.__init__",
        "after",
        "sglang_mminfer.families.processors:mend_processor",
        "Media processors of a server with mminfer get the mends of `mends.MENDS`. In the constructor and not where "
        "classes are chosen, because only here the server's arguments are known.",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.MultimodalDataItem.set_pad_value",
        "around",
        "sglang_mminfer.mends.identity:set_pad_value",
        "SGLang hashes a medium's features alone, and two media of equal features may be arranged differently. Items "
        "of other servers lack the key that this goes by.",
    ),
    Hook(
        "sglang.srt.disaggregation.encoder.receiver.EmbeddingData.__init__",
        "after",
        "sglang_mminfer.mends.pickles:modality_by_value",
        "What an encoder sends is pickled with a modality in it, in a form that depends on the Python.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
        "around",
        "sglang_mminfer.mends.words:guard_messages",
        "Only before the chat template runs can words of a conversation be told from placeholders of its media.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
        "around",
        "sglang_mminfer.mends.options:carry",
        "SGLang's models of a chat part drop the options that they do not know, and its conversation templates nearly "
        "all; here the request as it came and what is made of it are both at hand.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._apply_conversation_template",
        "around",
        "sglang_mminfer.mends.order:apply_template",
        "SGLang has the conversation template of InternVL in a table, with pictures before all else of a message.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        "sglang_mminfer.serving.clip_sender:generate_request",
        "Every way into a server ends here, so here the built-in clip can go before the first request; SGLang's own "
        "warm-up is one of HTTP servers only. And what a request brings for one prompt can be told from what it brings "
        "for many only before SGLang makes a batch of a request that wants several answers. And the files that a "
        "request names can be checked here before any is opened.",
    ),
    Hook(
        "sglang.srt.entrypoints.systemone.serving._read_image",
        "before",
        "sglang_mminfer.serving.media_root:before_decision",
        "The one way in that reads a picture before it makes a request of it.",
        since="0.5.22",
    ),
    Hook(
        "sglang.srt.multimodal.audio_from_video.is_audio_container",
        "before",
        "sglang_mminfer.serving.media_root:before_audio",
        "Here SGLang looks at the first bytes of a sound, wherever it came from, and the next to open it is a decoder, "
        "which would open the files that a playlist names.",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        "sglang_mminfer.serving.telemetry_http:add_routes",
        "The app is there, serves nothing yet, and gets the middleware of the API key inside. SGLang has no way for a "
        "plugin to add a route.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        "around",
        "sglang_mminfer.serving.telemetry:get_internal_state",
        "What prefills did is known to the schedulers, and HTTP is served by another process. This is the question "
        "that SGLang already has between them and that every data-parallel replica answers.",
    ),
    Hook(
        "sglang.srt.session.session_controller.Session.create_req",
        "around",
        "sglang_mminfer.mends.sessions:create_request",
        "Only here a turn's prompt and the media it inherits are put together; what does not fit ends the scheduler.",
    ),
    Hook(
        "sglang.srt.session.session_controller.SessionController.adjust_mm_offsets",
        "around",
        "sglang_mminfer.mends.sessions:place_media",
        "After it models replace placeholders, and some replace those of earlier turns again. Here a turn's own tokens "
        "and media are together.",
    ),
    Hook(
        "sglang.srt.session.session_controller.SessionController._close",
        "around",
        "sglang_mminfer.mends.sessions:close",
        "Closing a session frees the media of turns that still run, and the scheduler ends.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._get_multimodal_inputs",
        "around",
        "sglang_mminfer.mends.sessions:media_of",
        "What the scheduler cannot read of a request's media is the request's error, and no exception in its loop.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._maybe_compute_mrope_positions",
        "around",
        "sglang_mminfer.mends.routed:compute_positions",
        "Only here SGLang places the media of a prompt that its own tokenizer process did not make.",
    ),
    Hook(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "around",
        "sglang_mminfer.mends.requests:normalize",
        "Lists of media in lists, or too few of them, are an internal error here, and the client's by right.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
        "around",
        "sglang_mminfer.mends.aborts:begin",
        "Here alone a request's state and its client's connection are seen together.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
        "around",
        "sglang_mminfer.mends.aborts:tokenize",
        "Media are loaded inside, and SGLang looks for aborts and clients that left only when the scheduler has the "
        "request.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request",
        "around",
        "sglang_mminfer.mends.aborts:abort",
        "Every abort comes through here, and goes to the scheduler only.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "around",
        "sglang_mminfer.mends.requests:validate",
        "The last place where a request can be refused with a sentence: fields of the wrong kind end the scheduler.",
    ),
    Hook(
        "sglang.srt.model_loader.utils.get_model_architecture",
        "after",
        "sglang_mminfer.families.processors:adapt_model",
        "Faults in SGLang's models: `mends.MENDS` has them, llava_original and frames_apart.",
    ),
    Hook(
        "sglang.srt.utils.video_decoder.VideoDecoderWrapper.__init__",
        "around",
        "sglang_mminfer.serving.ffmpeg:decode_without_ffmpeg",
        "SGLang takes decord if torchcodec cannot be imported, but torchcodec looks for FFmpeg's libraries "
        "only with the first video: without them every video request fails. And every video passes here, so that a "
        "playlist, which names files of its own, is seen where a media root forbids that, and a file is hashed before "
        "it is opened, to find its frames among those of earlier turns.",
        when=("mminfer", "cpu"),
    ),
    Hook(
        "sglang.srt.utils.hf_transformers.config.HfModelConfigParser.parse",
        "around",
        "sglang_mminfer.families.own.registration:parse_config",
        "SGLang reads a config by its model type, and the checkpoints of `models` have one that transformers does "
        "not know (LongVILA) or takes for another model (LLaVA-Video).",
    ),
    Hook(
        "sglang.srt.utils.hf_transformers.processor.get_processor",
        "around",
        "sglang_mminfer.families.own.registration:load_processor",
        "The same checkpoints have no processor that transformers could load.",
    ),
    Hook(
        "handle_missing_default_values",
        "resolution",
        "sglang_mminfer.families.own.registration:resolve_tokenizer",
        "LongVILA keeps its tokenizer in a sub-folder; this step names the tokenizer's path if the user did not.",
    ),
    Hook(
        "handle_hardware_runtime_validation",
        "resolution",
        "sglang_mminfer.serving.cpu_platform:resolve_defaults",
        "The first step that knows whether the arguments ask for the CPU; SGLang chooses a platform before. And the "
        "defaults that a CPU needs, before SGLang reads the model's dtype or picks a device; the platform's own "
        "apply_server_args_defaults comes too late for both.",
        when=("load",),
    ),
    *cpu_platform.HOOKS,
)


@functools.cache
def register() -> None:
    """Entry point of group `sglang.srt.plugins`: declares `HOOKS` and installs those that every server needs. A second
    call does nothing."""
    hooks.declare(HOOKS)
    hooks.install("load")
    if cpu_platform.selected():  # else with `cpu_platform.use`
        hooks.install("cpu")
    hooks.say_if_impossible()

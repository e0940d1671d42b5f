"""Brings checkpoints of our families into SGLang, under architecture names that SGLang does not have.

SGLang needs three things of a checkpoint: its config, its processor and its tokenizer's folder. Hooks (see
`plugin.HOOKS`) answer for the architectures of the `OwnFamily` classes. SGLang answers for all other checkpoints, and
in servers without mminfer, which look for no file that SGLang would not look for. Our config names an architecture and
a model type that nobody else has, so no class of SGLang is replaced: an lmms-lab LLaVA-OneVision, whose config.json has
the same architecture as LLaVA-Video's, is served as before.

Nothing but the standard library is imported here before a server with mminfer asks about a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_mminfer import families
from sglang_mminfer.mends import asked

if TYPE_CHECKING:
    from sglang_mminfer.families.own.checkpoint import Checkpoint
    from sglang_mminfer.families.own.family import OwnFamily


def _read(path: Any, revision: str | None) -> tuple[OwnFamily, Any, Checkpoint] | None:
    """The family of a checkpoint, its config and its files; None if no family of ours serves it."""
    if not asked.for_mminfer():
        return None
    from sglang_mminfer.families.own.checkpoint import Checkpoint
    from sglang_mminfer.families.own.family import OwnFamily

    files = Checkpoint(str(path), revision)
    root = files.json("config.json") or {}
    architectures = root.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return None
    for family in families.known():
        if isinstance(family, OwnFamily) and architectures[0] in family.architectures:
            config = family.read_config(root, files)
            return None if config is None else (family, config, files)
    return None


def parse_config(
    original: Callable[..., Any], self: Any, model: Any, trust_remote_code: bool, *args: Any, **kwargs: Any
) -> Any:
    """AROUND HfModelConfigParser.parse: the config of a checkpoint of ours. From then on SGLang knows its classes."""
    ours = _read(model, args[0] if args else kwargs.get("revision"))
    if ours is None:
        return original(self, model, trust_remote_code, *args, **kwargs)
    family, config, _ = ours
    _register(family)
    return config


def _register(family: OwnFamily) -> None:
    """Registers a family's classes. Every process that builds a model or a processor reads the config before."""
    from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
    from sglang.srt.models.registry import ModelRegistry

    model, processor = family.classes()
    ModelRegistry.models[model.__name__] = model
    PROCESSOR_MAPPING[model] = processor


def load_processor(original: Callable[..., Any], tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """AROUND get_processor: these checkpoints have a tokenizer, and no processor that transformers could load."""
    revision = kwargs.get("revision", kwargs.get("tokenizer_revision"))
    ours = _read(kwargs.get("model_name") or tokenizer_name, revision)
    if ours is None:
        return original(tokenizer_name, *args, **kwargs)
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    family, config, _ = ours
    wanted = ("tokenizer_mode", "trust_remote_code", "tokenizer_backend")
    tokenizer = get_tokenizer(
        tokenizer_name, tokenizer_revision=revision, **{name: kwargs[name] for name in wanted if name in kwargs}
    )
    return TokenizerAndTemplate(tokenizer, family.chat_template(config))


class TokenizerAndTemplate:
    """The object that SGLang gets as the processor of a checkpoint.

    It is no bare tokenizer, because SGLang looks for the chat template on the processor, and loads some tokenizers
    again.
    """

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template


def resolve_tokenizer(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook: names the sub-folder of a checkpoint that keeps its tokenizer there."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    previous(server_args)
    cfg = resolving_view(server_args)
    if cfg.tokenizer_path != cfg.model_path:
        return  # the user named another tokenizer
    ours = _read(cfg.model_path, cfg.revision)
    if ours is not None:
        family, config, files = ours
        if folder := family.tokenizer_folder(config):
            path = files.folder(folder)
            if not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
                # Offline, the hub's cache gives what it has. SGLang's own error would name a path that nobody gave.
                raise ValueError(
                    f"{cfg.model_path}: expected its tokenizer in the folder {folder}, got no tokenizer_config.json at "
                    f"{path}; download the whole checkpoint, or give --tokenizer-path"
                )
            declare_resolution(server_args, __name__, tokenizer_path=path)

"""The model that these families share: an encoder of rasters before one of SGLang's own language models."""

from __future__ import annotations

import logging
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.mm_utils import general_mm_embed_routine
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.utils import add_prefix
from torch import nn

from sglang_mminfer import releases

logger = logging.getLogger(__name__)

LANGUAGE_MODELS = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}

ENCODED_AT_ONCE = 32
"""Pictures that go through a vision tower together: a whole video at once would need gigabytes of activations."""

Weights = Iterable[tuple[str, torch.Tensor]]


class VisionLanguageModel(nn.Module):
    """Embeds each item by the family's `encode` and runs the language model.

    The encoder is replicated on every tensor-parallel rank; the language model is split.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        text = config.text_config
        if text.model_type not in LANGUAGE_MODELS:
            raise ValueError(f"language model: expected one of {', '.join(LANGUAGE_MODELS)}, got {text.model_type!r}")
        self.language_model = LANGUAGE_MODELS[text.model_type](
            config=text, quant_config=quant_config, prefix=add_prefix("language_model", prefix)
        )

    @abstractmethod
    def encode(self, item: MultimodalDataItem, features: torch.Tensor) -> torch.Tensor:
        """The embedding of one item: [tokens, hidden].

        Args:
            features: what `see` returns for the item's pictures: [pictures, ...].
        """

    @abstractmethod
    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision tower, and all else that is done picture by picture: from uint8 pixels [n, ...] to [n, ...]."""

    def get_image_feature(self, items: list[MultimodalDataItem]) -> list[torch.Tensor]:
        """One embedding [tokens, hidden] for each item. SGLang calls this method by its name."""
        logger.debug("mminfer: %d items go through the vision tower.", len(items))
        pixels = [self._pictures(item) for item in items]
        features = torch.cat([self.see(part) for part in torch.cat(pixels).split(ENCODED_AT_ONCE)])
        parts = features.split([len(one) for one in pixels])
        # Copies: SGLang caches them one by one, and a view would keep the features of all in memory.
        return [self.encode(item, part).clone() for item, part in zip(items, parts)]

    get_video_feature = get_image_feature

    @staticmethod
    def _pictures(item: MultimodalDataItem) -> torch.Tensor:
        """The pixels of an item's pictures, [pictures, ...]. An item of one picture may lack the first dimension."""
        pixels = item.feature
        return pixels if pixels.ndim == 4 else pixels[None]

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch, **kwargs: Any
    ) -> LogitsProcessorOutput:
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: self.get_image_feature, Modality.VIDEO: self.get_video_feature},
            positions=positions,
            **kwargs,
        )

    def pad_input_ids(self, input_ids: array, mm_inputs: MultimodalInputs) -> array:
        """The keys of SGLang's radix cache: the tokens of each item get values made of the item's hash."""
        return releases.pad_mm_tokens(input_ids, mm_inputs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.language_model.get_embed_and_head()

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        self.language_model.set_embed_and_head(embed, head)

    @abstractmethod
    def own_name(self, name: str) -> str | None:
        """The parameter of this model that a tensor of the checkpoint goes to; "" if the tensor is not used, None if it
        belongs to the language model."""

    def language_name(self, name: str) -> str:
        """The language model's own name for one of its tensors."""
        return name

    def load_weights(self, weights: Weights) -> None:
        """Loads the checkpoint's tensors by their original names.

        Raises:
            ValueError: naming a tensor that is missing, has another shape, or has no place in this model.
        """
        parameters = {name: p for name, p in self.named_parameters() if not name.startswith("language_model.")}
        loaded: set[str] = set()

        def language_weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                target = self.own_name(name)
                if target is None:
                    yield self.language_name(name), tensor
                elif target:
                    parameter = parameters.get(target)
                    if parameter is None:
                        raise ValueError(f"checkpoint: {name} has no place in this model (as {target})")
                    if parameter.shape != tensor.shape:
                        raise ValueError(
                            f"checkpoint: {name}: expected {list(parameter.shape)}, got {list(tensor.shape)}"
                        )
                    with torch.no_grad():
                        parameter.copy_(tensor)
                    loaded.add(target)

        self.language_model.load_weights(language_weights())
        if missing := sorted(set(parameters) - loaded):
            raise ValueError(f"checkpoint: {len(missing)} tensors are missing, among them {missing[0]}")

"""Qwen3-Omni: its thinker, which takes pictures, video and sound and answers with text.

A picture or a video is one span of placeholders, as in Qwen2-VL, whose processor SGLang uses. Sound has no raster, so
maps count it as text.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.families.base import MediaItem, Reader
from sglang_mminfer.families.grid_thw import GridFamily
from sglang_mminfer.mends.token_ids import Piece, collapsed

_MEND = "qwen3_omni"
_SOUND = "<|audio_pad|>"
_SECONDS = ("second_per_grid_ts", "video_second_per_grid")
"""The keys by which SGLang is told the seconds between two temporal patches of each video."""


class Qwen3Omni(GridFamily):
    """Qwen3-Omni. SGLang's processor has the thinker's config, and all other parts of SGLang have the whole."""

    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    why = "A video is one raster, as in Qwen2.5-VL; the thinker's config lies inside that of the whole."
    processors = ("QwenVLImageProcessor",)

    def geometry(self, hf_config: Any) -> Reader:
        return super().geometry(getattr(hf_config, "thinker_config", hf_config))

    def processor(self, base: type, hf_config: Any) -> type | None:
        return _processor_class(base) if hf_config.model_type in self.model_types else None

    def check_features(self, one: MediaItem, shape: tuple[int, ...], tokens: int, hf_config: Any) -> None:
        if one.item.is_audio():
            raise ValueError(f"{one.label}: processor_output is not taken for sound; send the sound itself")
        super().check_features(one, shape, tokens, hf_config)


@functools.cache
def _processor_class(base: Any) -> type:
    from sglang_mminfer.families.qwen_vl.processor import METADATA, processor_class

    class MMInferQwen3OmniProcessor(processor_class(base)):  # type: ignore[misc]
        """The processor of the older models, with positions by the real time of frames and the length of each sound."""

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            sounds = len(re.findall(f"(?:{re.escape(_SOUND)})+", prompt))
            return {**super().placeholders_in(prompt), "audio": sounds}

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            return collapsed(super().collapse_media(pieces, counts), counts, {_SOUND: ("audio",)})

        async def process_and_combine_mm_data_async(self, base_output: Any, *args: Any, **kwargs: Any) -> Any:
            items, ids, result = await super().process_and_combine_mm_data_async(base_output, *args, **kwargs)
            from_client = any(isinstance(one, dict) for _, one in base_output.organize_results())
            if from_client and any(item.is_video() for item in items) and not any(key in result for key in _SECONDS):
                raise ValueError(f"video_data: expected {_SECONDS[0]} in what a client preprocessed, got none")
            if mends.active(_MEND) and items and not from_client:
                if (seconds := self._seconds(base_output, result)) is not None:
                    result["video_second_per_grid"] = seconds
                    _note(items, seconds)
                # SGLang takes these for the processor's own, and computes none.
                result["mrope_positions"], result["mrope_position_delta"] = self._positions(ids, result)
            return items, ids, result

        def _seconds(self, base_output: Any, result: Any) -> Any:
            """The seconds between two temporal patches of each video, float32; None without a video.

            Where SGLang does not tell the rates, it is what transformers' processor assumes.
            """
            import torch

            films = getattr(base_output, METADATA, None)
            if not films or not all(films):
                return result.get("video_second_per_grid")
            patch = self.hf_config.vision_config.temporal_patch_size
            return torch.tensor([patch / _rate(film) for film in films])

        def _positions(self, ids: Any, result: Any) -> tuple[Any, Any]:
            """m-RoPE positions of a prompt, int64 [3, tokens], and how far behind its tokens the next position is.

            The time of a frame may be no whole position, and then nothing behind it is. SGLang's positions are whole,
            so the fraction of each is cut off.

            Args:
                ids: of its tokens, those of media included.
                result: what transformers' processor made of the prompt.
            """
            from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

            sounds = result.get("feature_attention_mask")
            positions, _ = MRotaryEmbedding.get_rope_index(
                spatial_merge_size=self.spatial_merge_size,
                image_token_id=self.mm_tokens.image_token_id,
                video_token_id=self.mm_tokens.video_token_id,
                vision_start_token_id=self.vision_start_token_id,
                model_type=self.model_type,
                input_ids=ids.reshape(1, -1),
                image_grid_thw=result.get("image_grid_thw"),
                video_grid_thw=result.get("video_grid_thw"),
                second_per_grid_ts=result.get("video_second_per_grid"),
                use_audio_in_video=False,
                audio_seqlens=None if sounds is None else sounds.sum(-1),
                audio_token_id=self.audio_token_id,
                audio_start_token_id=self.audio_start_token_id,
                position_id_per_seconds=self.hf_config.position_id_per_seconds,
            )
            whole = positions.reshape(3, -1).floor().long()
            return whole, (whole.max() + 1 - whole.shape[1]).reshape(1, 1)

    return MMInferQwen3OmniProcessor


def _note(items: list[Any], seconds: Any) -> None:
    """Writes the seconds of each video into its item: they are a part of its identity, because its tokens' positions
    depend on them."""
    first = 0
    for item in items:
        if item.is_video():
            stop = first + len(item.model_specific_data["video_grid_thw"])
            item.model_specific_data[_SECONDS[0]] = seconds[first:stop]
            first = stop


def _rate(film: dict[str, Any]) -> float:
    """Frames a second of those that were taken of a video."""
    return len(film["frames_indices"]) / film["total_num_frames"] * film["fps"]

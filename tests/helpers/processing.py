"""SGLang's own processing of a prompt with media, in this process: what a server's tokenizer process does."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_mminfer import releases
from sglang_mminfer.families.maps import map_from_mm_inputs, reader_of
from sglang_mminfer.modality.segments import ModalityMap


class Processed:
    """A prompt as the scheduler gets it: token ids and media, and the map that is made of them."""

    def __init__(self, output: Any, hf_config: Any) -> None:
        self.ids = [int(token) for token in output.input_ids]
        self.items = output.mm_items
        self.output = output
        self.map: ModalityMap = map_from_mm_inputs(output, len(self.ids), reader_of(hf_config))

    def runs(self, token: int) -> list[tuple[int, int]]:
        """[start, stop) of every run of one token."""
        return [(start, stop) for value, start, stop in runs_of(self.ids) if value == token]


def kind_of(part: str | Path) -> str:
    """The kind of a part of a prompt: "str", or the suffix of a file."""
    return "str" if isinstance(part, str) else part.suffix


def check_padding(items: Sequence[Any], ids: Sequence[int]) -> None:
    """Asserts that every token of the media stands for its own item, in ids that SGLang has padded."""
    for item in items:
        ((start, stop),) = item.offsets
        assert list(ids[start : stop + 1]) == releases.padding(item, stop + 1 - start)


class Processing:
    """The processor that SGLang gives a checkpoint.

    Args:
        path: the checkpoint.
        module: the module of SGLang that holds the processor's class, below `multimodal.processors`. A server
            imports all of them, which takes long.
        **fields: of ServerArgs.
    """

    def __init__(self, path: Path, module: str, **fields: Any) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING, get_mm_processor_cls
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils.hf_transformers_utils import get_processor

        fields = {"attention_backend": "mminfer", "tokenizer_path": _tokenizer_of(path), **fields}
        self.arguments = arguments = ServerArgs(model_path=str(path), **fields)
        with self.published():
            self.hf_config = ModelConfig.from_server_args(arguments).hf_config
            hf_processor = get_processor(
                arguments.tokenizer_path, model_name=str(path), trust_remote_code=arguments.trust_remote_code
            )
            self.tokenizer = getattr(hf_processor, "tokenizer", hf_processor)
            for kind in vars(importlib.import_module(f"sglang.srt.multimodal.processors.{module}")).values():
                if isinstance(kind, type):
                    PROCESSOR_MAPPING.update(dict.fromkeys(getattr(kind, "models", ()), kind))
            # Without a ModelConfig it does not look for the model's class, for which it would import all models.
            kind = get_mm_processor_cls(self.hf_config)
            self.processor = kind(self.hf_config, arguments, hf_processor, "default")

    @contextmanager
    def published(self) -> Iterator[None]:
        """SGLang's configuration of this process is that of a tokenizer with the processor's arguments."""
        from sglang.srt import runtime_context

        before = runtime_context.snapshot_context()
        runtime_context.publish(self.arguments, role="tokenizer")
        try:
            yield
        finally:
            runtime_context.restore_context(before)

    def token(self, text: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(text))

    def __call__(
        self,
        prompt: str | list[int],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        sounds: Sequence[Any] = (),
    ) -> Processed:
        """What becomes of files, or of anything else that a request may hold."""
        media = [
            [str(one) if isinstance(one, Path) else one for one in kind] or None for kind in (images, videos, sounds)
        ]
        request = SimpleNamespace(
            image_data=media[0],
            video_data=media[1],
            audio_data=media[2],
            modalities=None,
            rid="test",
        )
        with self.published():
            output = asyncio.run(
                self.processor.process_mm_data_async(
                    image_data=request.image_data, audio_data=request.audio_data, input_text=prompt, request_obj=request
                )
            )
        return Processed(output, self.hf_config)


def _tokenizer_of(path: Path) -> str:
    """The folder of a checkpoint's tokenizer: LongVILA keeps it with its language model."""
    below = path / "llm"
    return str(below if (below / "tokenizer_config.json").exists() else path)


def runs_of(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Token, start and stop of every run of equal tokens."""
    position = 0
    for token, group in groupby(ids):
        length = len(list(group))
        yield token, position, position + length
        position += length


def cells_of(modality_map: ModalityMap) -> list[tuple[str, int | None, tuple[int, int, int] | None]]:
    """For each token its modality, the number of its medium, and frame, row and column if it has a cell."""
    cells: list[tuple[str, int | None, tuple[int, int, int] | None]] = []
    medium = -1
    for segment in modality_map.segments:
        size = segment.stop - segment.start
        if segment.modality == "text":
            cells += [("text", None, None)] * size
            continue
        medium += 1
        block: list[tuple[str, int | None, tuple[int, int, int] | None]] = [(segment.modality.value, medium, None)]
        block *= size
        if grid := segment.grid:
            for frame, start in enumerate(grid.frame_starts):
                for cell in range(grid.cells):
                    where = (frame, cell // grid.cols, cell % grid.cols)
                    block[start - segment.start + cell] = (segment.modality.value, medium, where)
        cells += block
    return cells

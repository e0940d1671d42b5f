"""A family that SGLang does not serve: this package brings its model, its processor, and what SGLang asks about it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_mminfer.families.base import Family, Reader
from sglang_mminfer.families.own.geometry import PlacedReader

if TYPE_CHECKING:
    from sglang_mminfer.families.own.checkpoint import Checkpoint


class OwnFamily(Family):
    """A family of ours. Its items say where they stand (`own.geometry`); `own.registration` brings it into SGLang.

    Attributes:
        architectures: those in the config.json of checkpoints that may belong to this family.
    """

    architectures: ClassVar[tuple[str, ...]] = ()

    def geometry(self, hf_config: Any) -> Reader:
        return PlacedReader(merged=getattr(hf_config, "vision_tokens_merged", False) is True)

    @abstractmethod
    def read_config(self, root: dict[str, Any], files: Checkpoint) -> Any:
        """The config of a checkpoint whose config.json is `root`; None if it belongs to another family after all.

        The config names an architecture and a model type that SGLang does not have.

        Raises:
            ValueError: naming the field that cannot be served, what it is and what was expected.
        """

    @abstractmethod
    def classes(self) -> tuple[type, type]:
        """The classes of model and processor. The model's class is named as the architecture in the family's config."""

    @abstractmethod
    def chat_template(self, config: Any) -> str:
        """The chat template as Jinja source. It writes a media part as `<image>` or `<video>`."""

    def tokenizer_folder(self, config: Any) -> str:
        """The sub-folder that holds the tokenizer, "" if it is the checkpoint's own."""
        return ""

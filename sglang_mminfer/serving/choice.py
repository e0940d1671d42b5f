"""Whether a chunk of a request runs sparse: the one place that decides it, by the request's own length and media.

What is decided follows from counts alone, never from a clock or from what else is in the batch, so all ranks and all
repetitions decide alike, but for heads that the guard made dense: a rank knows its own of these. How many keys heads
choose is measured once, before any request runs sparse. Tensor-parallel ranks tell each other; while the server that
measured it lives, a pipeline stage knows it of its own layers alone. A chunk that runs dense sees all that its patterns
ask for and more. Where a prompt is cut may decide which of its rows do, which is the one exception to chunk invariance.
"""

from __future__ import annotations

from sglang_mminfer import settings
from sglang_mminfer.head_config.config import HeadConfig
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.planning.budget import PlanBudget, line_strides
from sglang_mminfer.planning.cost import Comparison
from sglang_mminfer.planning.coverage import lacks_raster, leaves_out


class Choice:
    """Decides for the requests of one model.

    Args:
        head_config: of the whole model, so that ranks with different heads decide alike.
        comparison: of these heads with dense attention.

    Attributes:
        lacks_basis: whether heads choose keys by q . k itself, which takes as long as dense attention.
    """

    def __init__(self, head_config: HeadConfig, comparison: Comparison) -> None:
        self.dense_below = head_config.defaults.dense_below
        self.budget = PlanBudget(*settings.plan_budget())
        self.comparison = comparison
        self._patterns = {head for layer in head_config.layers for head in layer}
        self._line_strides = line_strides(self._patterns)
        self.only_if_faster = settings.sparse() == "faster"
        self.lacks_basis = head_config.basis_rank > 0 and head_config.basis is None

    def why_dense(self, modality_map: ModalityMap, start: int, stop: int, prompt: int) -> str | None:
        """The dense_reason of rows [start, stop) of a request; None: they run sparse.

        Args:
            prompt: tokens of the prompt; what is behind them was generated.
        """
        if not modality_map.has_vision:
            return "no_media"
        if start >= prompt:
            return "decode"
        if stop <= self.dense_below:
            return "short"
        stop = min(prompt, stop)
        if lacks_raster(modality_map):
            rows = max(start, self.dense_below), stop
            if not any(leaves_out(head, modality_map, *rows) for head in self._patterns):
                return "no_raster"
        if not self.budget.allows(modality_map, start, stop, self._line_strides):
            return "plan_budget"
        if self.only_if_faster and (
            self.lacks_basis or not self.comparison.sparse_is_faster(modality_map, start, stop)
        ):
            return "not_faster"
        return None

"""The guard: a head whose audited output error is too large runs dense, for requests that begin afterwards.

It takes the errors that the audit has measured and has fetched from the device, so it costs a few comparisons for each
audited request. A request that has begun keeps its heads for all of its chunks: see served_heads.py.

A head goes to dense at once, because what is in between would have to be audited anew while answers are wrong. It stays
dense until the server ends: a dense head has no error, so nothing that the audit measures could tell that its pattern
is right again.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from statistics import fmean

from sglang_mminfer.patterns.boundary import patterns_of
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.serving.metrics import GuardMetrics
from sglang_mminfer.serving.served_heads import ServedHeads
from sglang_mminfer.serving.trace import GuardedHead

logger = logging.getLogger(__name__)

REQUESTS = 3
"""A head becomes dense when its error exceeds the bound in so many audited requests in a row."""

MOST_UNFINISHED = 64
"""Where more requests have incomplete prompts, the oldest is forgotten: a client may have aborted it."""

Head = tuple[int, int]
"""A layer, and a head numbered as in the whole model."""


class Guard:
    """Decides which heads of this rank run dense for requests that begin from now on.

    A head's error in a request is that of all its audited chunks, by their audited rows. Ranks decide for their own
    heads, which no other rank computes, so they need not agree.

    Args:
        bound: the largest relative output error that a head may have.
        served: what the heads do at first.
        metrics: counts the heads; None: no metrics.

    Attributes:
        served: what the heads do for requests that begin now.
    """

    def __init__(self, bound: float, served: ServedHeads, metrics: GuardMetrics | None = None) -> None:
        self.bound, self.served, self.metrics = bound, served, metrics
        self._unfinished: OrderedDict[str, dict[Head, list[tuple[float, int]]]] = OrderedDict()
        self._too_large: dict[Head, list[float]] = {}

    def __str__(self) -> str:
        return (
            f"guard: a head whose output error exceeds {self.bound:g} in {REQUESTS} audited requests in a row runs "
            "dense for requests that begin afterwards"
        )

    def add(self, rid: str, layer: int, first_head: int, errors: Sequence[float], rows: int) -> None:
        """Takes the errors of a layer's heads in one audited chunk.

        Args:
            first_head: the model's number of the first of these heads.
            rows: audited rows.
        """
        chunks = self._unfinished.setdefault(rid, defaultdict(list))
        for head, error in enumerate(errors, first_head):
            chunks[layer, head].append((error, rows))
        if len(self._unfinished) > MOST_UNFINISHED:
            self._unfinished.popitem(last=False)

    def prompt_done(self, rid: str) -> list[GuardedHead]:
        """Judges the heads by a request whose prompt is complete.

        Returns:
            the heads that run dense for requests that begin from now on, and did not before.
        """
        over: dict[Head, list[float]] = {}
        for head, chunks in self._unfinished.pop(rid, {}).items():
            error = sum(error * rows for error, rows in chunks) / sum(rows for _, rows in chunks)
            if error <= self.bound or self._is_dense(head):  # NaN is no error that is small enough
                self._too_large.pop(head, None)
                continue
            errors = self._too_large.setdefault(head, [])
            errors.append(error)
            if len(errors) >= REQUESTS:
                over[head] = errors
        if not over:
            return []
        self.served = self.served.with_dense(list(over))
        for head in over:
            del self._too_large[head]
        changes = [
            GuardedHead(layer=layer, head=head, error=mean if math.isfinite(mean := fmean(errors)) else None)
            for (layer, head), errors in over.items()
        ]
        if self.metrics is not None:
            self.metrics.add(changes)
        logger.warning(
            "mminfer: guard: the output error of %s exceeded %g in %d audited requests in a row; dense for requests "
            "that begin from now on (%d heads of this rank so far)",
            ", ".join(f"layer {layer} head {head} ({fmean(errors):.3g})" for (layer, head), errors in over.items()),
            self.bound,
            REQUESTS,
            self.served.guarded,
        )
        return changes

    def _is_dense(self, head: Head) -> bool:
        layer, number = head
        patterns = patterns_of(self.served.head_config.patterns(layer)[number])
        return all(isinstance(pattern, Dense) for pattern in patterns)

"""How much planning a chunk may cost: decided before any of it is done, and by counting, never by a clock.

What is counted follows from the map, the head config and the chunk's bounds alone, so all tensor-parallel ranks and
every repetition decide alike, whatever else they are busy with. The milliseconds are those counts times `NANOSECONDS`,
measured on one core of a server CPU by `python -m sglang_mminfer.benchmarks.plan_time`, a little rounded up.

A chunk beyond the budget runs dense and is counted as `plan_budget`; others of the same prompt may still run sparse.
A dense row sees all that its pattern asks for and more, so its answer only gets nearer to that of dense attention.
But where a prompt is cut may then decide which of its rows are dense, which is the one exception to chunk invariance:
it begins far beyond what people send (see sglang_mminfer/benchmarks/results/plan_time.json).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern, patterns_of
from sglang_mminfer.planning.lines import LineOrder
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q

ROWS = 8192
"""The budget's milliseconds are for a chunk of so many rows or fewer; a longer one has more in proportion."""

# One row of the chunk; a segment or frame; a key's place in a key order; a (query tile, key tile) visit that the host
# names by itself; one that is a part of a range and is spelled out on the device.
NANOSECONDS = {"rows": 400, "spans": 500, "keys": 25, "line_visits": 150, "base_visits": 15}
BYTES = {"rows": 150, "spans": 150, "keys": 24, "line_visits": 100, "base_visits": 24}


def line_strides(heads: Iterable[HeadPattern]) -> tuple[str, ...]:
    """The strides along whose lines any of the heads looks, sorted."""
    strides = {pattern.line_stride for head in heads for pattern in patterns_of(head)}
    return tuple(sorted(stride for stride in strides if stride is not None))


def count_work(modality_map: ModalityMap, q_start: int, kv_len: int, stride: str | None) -> dict[str, int]:
    """What planning rows [q_start, kv_len) of one head pattern works on, by the names of `NANOSECONDS`.

    Args:
        stride: of the lines through rasters that the pattern looks along; None: along none.
    """
    table, rows = modality_map.table, kv_len - q_start
    count = {
        "rows": rows,
        "spans": int((table.start < kv_len).sum()) + int((table.frame_starts < kv_len).sum()),
        "keys": kv_len,
        "line_visits": 0,
        "base_visits": -(-rows // BLOCK_Q) * -(-(q_start + kv_len) // (2 * BLOCK_K)),
    }
    if stride is not None:
        order = LineOrder(table, stride, q_start, kv_len, BLOCK_Q, BLOCK_K)
        count["keys"] += order.num_tiles * BLOCK_K
        count["line_visits"] = order.count_visits()
    return count


@dataclass(frozen=True)
class PlanBudget:
    """What planning one head pattern may cost in one chunk of one request."""

    milliseconds: float
    megabytes: float

    def allows(self, modality_map: ModalityMap, q_start: int, kv_len: int, strides: Iterable[str]) -> bool:
        """Whether rows [q_start, kv_len) may be planned. Costs what the segments and frames cost, about a millisecond
        for 10,000 of them.

        Args:
            strides: `line_strides` of all heads of the model, whichever of them this rank holds.
        """
        for stride in (None, *strides):
            count = count_work(modality_map, q_start, kv_len, stride)
            milliseconds, megabytes = estimate(count)
            if milliseconds > self.milliseconds * max(1.0, count["rows"] / ROWS) or megabytes > self.megabytes:
                return False
        return True


def estimate(count: dict[str, int]) -> tuple[float, float]:
    """Milliseconds and megabytes for what `count_work` counted."""
    return (
        sum(NANOSECONDS[name] * number for name, number in count.items()) / 1e6,
        sum(BYTES[name] * number for name, number in count.items()) / 1e6,
    )

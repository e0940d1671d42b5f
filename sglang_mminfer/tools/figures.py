"""Drawings of what the plugin did: a conversation's modality map, its chunks, and the tiles its heads visit.

Functions that return plain data (`map_of_prompt`, `turn_of_records`, `visited_share`) compute what is drawn, so that a
test can compare a drawing with the plan without looking at pixels. Visited tiles come from the planner that the server
itself uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from sglang_mminfer.families.base import Reader
from sglang_mminfer.families.maps import map_from_mm_inputs
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.planning.visited import tile_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sglang_mminfer.serving.trace import PrefillRecord

# Readers with any colour vision can tell these colours apart, in grey too.
COLOURS = {Modality.TEXT: "#e69f00", Modality.IMAGE: "#00795a", Modality.VIDEO: "#3b7fc4"}
CACHED_ALPHA = 0.28
BINS, DETAIL_BINS = 256, 128  # squares along a side: with more squares than pixels thin lines would get lost
VISITED_COLOURS = ("#eef2f7", "#0b3c6f")  # nothing visited, everything visited


# ---- data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """How the prompt of one turn was prefilled: tokens [0, cached) from the cache, then chunk by chunk."""

    label: str
    chunks: tuple[tuple[int, int], ...]
    """[start, stop) of every prefill, in order."""

    @property
    def cached(self) -> int:
        """Tokens that came from the radix cache."""
        return self.chunks[0][0] if self.chunks else 0

    @property
    def prompt(self) -> int:
        """Tokens of the whole prompt."""
        return self.chunks[-1][1] if self.chunks else 0


def turn_of_records(label: str, records: Iterable[PrefillRecord]) -> Turn:
    """The turn that the trace records of one request describe.

    Raises:
        ValueError: if the chunks do not follow one another, as when records of two requests are mixed.
    """
    chunks = tuple((r.prefix_len, r.seq_len) for r in sorted(records, key=lambda r: r.prefix_len) if r.chunk_len)
    for (_, stop), (start, _) in pairwise(chunks):
        if start != stop:
            raise ValueError(f"{label}: expected a chunk that starts at {stop}, got one at {start}: two requests?")
    return Turn(label, chunks)


def placeholder_spans(prompt_ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    """[start, stop) of every run of one placeholder token in a prompt."""
    spans: list[tuple[int, int]] = []
    for position, prompt_id in enumerate(prompt_ids):
        if prompt_id != token:
            continue
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return spans


def map_of_prompt(
    prompt_ids: Sequence[int],
    placeholders: Mapping[Modality, int],
    grids: Mapping[Modality, Sequence[tuple[int, int, int]]],
    reader: Reader | None,
) -> ModalityMap:
    """The map of a prompt, rebuilt outside the server from its token ids and the processor's grids.

    The server forgets its map when a request is done. The same geometry code makes it again here, from the same
    facts: where the placeholders stand in the real prompt, and the [t, h, w] of each medium in order.

    Args:
        prompt_ids: the whole prompt, placeholders expanded, as the server returns it.
        placeholders: the token of images and of videos.
        grids: [t, h, w] before the merger, of each image and each video in their order.
        reader: what `families.maps.reader_of` gives for the model.

    Raises:
        GeometryError: if the grids do not fit the placeholders.
    """
    items = []
    for modality, token in placeholders.items():
        offsets = [(start, stop - 1) for start, stop in placeholder_spans(prompt_ids, token)]
        if offsets:
            data = {f"{modality}_grid_thw": [list(row) for row in grids[modality]]} if modality in grids else {}
            items.append(SimpleNamespace(modality=modality.name, offsets=offsets, model_specific_data=data))
    return map_from_mm_inputs(SimpleNamespace(mm_items=items), len(prompt_ids), reader)


def plan_of(modality_map: ModalityMap, heads: Sequence[HeadPattern], dense_below: int = 0) -> BlockPlan:
    """The plan of a prefill of the whole prompt at once: what `heads` visit.

    Static patterns visit the same tiles however the prompt is cut, so this is also what a server visits chunk by
    chunk and turn by turn. Estimated patterns need queries and keys, which are not here.

    Raises:
        ValueError: for an estimated pattern.
    """
    length = modality_map.length
    chunk = RequestChunk(modality_map, 0, length, 0, torch.arange(length))
    return BatchPlanner([chunk] if length else [], length, dense_below=dense_below).plan(heads)


def visited_share(
    plan: BlockPlan,
    head: int,
    bin_size: int,
    rows: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
) -> torch.Tensor:
    """float64 [row bins, key bins]: visited over causal pairs for squares of `bin_size` rows by `bin_size` keys.

    Squares without causal pairs are NaN.

    Args:
        plan: a plan of one request, from position 0 on.
        rows, keys: [start, stop) of a part of the matrix; bins count from its start. Default: all.
    """
    rows, keys = rows or (0, plan.num_rows), keys or (0, plan.num_rows)
    visited = torch.zeros_like(causal := causal_pairs(rows, keys, bin_size))
    for tile, group in enumerate(plan.q_heads.tolist()):
        if head in plan.head_groups[group]:
            _add_tile(visited, plan, tile, bin_size, rows, keys)
    return (visited / causal).masked_fill(causal == 0, torch.nan)


def _add_tile(
    visited: torch.Tensor, plan: BlockPlan, tile: int, bin_size: int, rows: tuple[int, int], keys: tuple[int, int]
) -> None:
    """Adds the pairs of one query tile, by the rule at the top of block_plan.py."""
    tile_rows = slice(int(plan.q_indptr[tile]), int(plan.q_indptr[tile + 1]))
    row, stop = plan.q_rows[tile_rows].long(), plan.q_stop[tile_rows]
    drawn = (row >= rows[0]) & (row < rows[1])
    row, stop = row[drawn] - rows[0], stop[drawn]
    if not len(row):
        return
    position = tile_positions(plan, tile)
    counted = (position >= keys[0]) & (position < min(int(stop.max()), keys[1]))
    # A row sees the keys before its bound: with keys in order, that is a count for each bin of keys.
    position = position[counted].sort().values
    key_bins, counts = ((position - keys[0]) // bin_size).unique_consecutive(return_counts=True)
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    keys_seen = torch.searchsorted(position, stop)  # int64 [rows]
    seen = (keys_seen[:, None] - edges[:-1]).clamp_min(0).minimum(counts)
    visited.index_put_((row[:, None] // bin_size, key_bins.long()), seen.to(visited.dtype), accumulate=True)


def causal_pairs(rows: tuple[int, int], keys: tuple[int, int], bin_size: int) -> torch.Tensor:
    """float64 [row bins, key bins]: pairs at or below the diagonal in each square."""
    row = torch.arange(*rows)
    starts = torch.arange(*keys, bin_size)
    width = (keys[1] - starts).clamp_max(bin_size)
    pairs = torch.zeros(-(-len(row) // bin_size), len(starts), dtype=torch.float64)
    per_row = (row[:, None] + 1 - starts).clamp_min(0).minimum(width).double()
    return pairs.index_add_(0, (row - rows[0]) // bin_size, per_row)


def busiest_stretch(modality_map: ModalityMap, margin: float = 0.12) -> tuple[int, int] | None:
    """[start, stop) of the longest run of segments without a video, which a strip of the whole map shows too coarsely.

    None if the map has no video, or if that run is more than half of it.

    Args:
        margin: how much to add on both sides, as a share of the run.
    """
    runs: list[list[Segment]] = [[]]
    for segment in modality_map.segments:
        if segment.modality is Modality.VIDEO:
            runs.append([])
        else:
            runs[-1].append(segment)
    run = max(runs, key=len)
    if len(runs) == 1 or not run:
        return None
    start, stop = run[0].start, run[-1].stop
    if stop - start > modality_map.length / 2:
        return None
    pad = max(1, round((stop - start) * margin))
    return max(0, start - pad), min(modality_map.length, stop + pad)


# ---- drawing -------------------------------------------------------------------------------------------------


def draw_map_strip(
    ax: Axes,
    modality_map: ModalityMap,
    turns: Sequence[Turn] = (),
    *,
    limits: tuple[int, int] | None = None,
    names: bool = False,
) -> None:
    """Draw one bar for each turn, coloured by modality. Tokens from the cache are pale.

    Frames alternate in shade, chunk boundaries are black lines. Without turns there is one bar for the whole map.

    Args:
        limits: [start, stop) of the tokens to show; None: all.
        names: write above the bars what each segment is, where there is room.
    """
    rows = list(turns) or [Turn("prompt", ((0, modality_map.length),))]
    low, high = limits or (0, modality_map.length)
    thinnest = (high - low) / 500  # a text of 12 tokens between two videos must still be seen
    for y, turn in enumerate(rows):
        for segment in modality_map.segments:
            if segment.start < turn.prompt:
                _bar(ax, segment, turn, y, thinnest, (low, high))
        for start, stop in turn.chunks:
            for edge in {start, stop}:
                if low <= edge <= high:
                    ax.plot([edge, edge], [y - 0.44, y + 0.44], color="black", lw=1.1, solid_capstyle="butt", zorder=4)
    if names:
        for segment in modality_map.segments:
            start, stop = max(segment.start, low), min(segment.stop, high)
            if stop - start > 0.07 * (high - low):
                ax.text((start + stop) / 2, -0.56, _name(segment), ha="center", va="bottom", fontsize=8)
    ax.set_xlim(low, max(high, low + 1))
    ax.set_ylim(len(rows) - 0.4, -1.0 if names else -0.6)
    labels = [f"{t.label}\n{t.cached:,} cached + {t.prompt - t.cached:,} new" for t in rows]
    ax.set_yticks(range(len(rows)), labels if turns else [""], fontsize=8)
    ax.set_xlabel("position in the prompt (tokens)", fontsize=9)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _bar(ax: Axes, segment: Segment, turn: Turn, y: int, thinnest: float, limits: tuple[int, int]) -> None:
    colour = COLOURS[segment.modality]
    for start, stop, alpha in (
        (segment.start, min(segment.stop, turn.cached), CACHED_ALPHA),
        (max(segment.start, turn.cached), min(segment.stop, turn.prompt), 1.0),
    ):
        if stop <= start:
            continue
        width = max(stop - start, thinnest)
        middle, order = (start + stop) / 2, 3 if segment.modality is Modality.TEXT else 2
        ax.barh(y, width, 0.72, left=middle - width / 2, color="white", lw=0, zorder=order)
        ax.barh(y, width, 0.72, left=middle - width / 2, color=colour, alpha=alpha, lw=0, zorder=order)
        for frame in segment.grid.frame_starts[1::2] if segment.grid else ():
            left, right = max(frame, start), min(frame + segment.grid.cells, stop)  # type: ignore[union-attr]
            if left < right and right > limits[0] and left < limits[1]:
                ax.barh(y, right - left, 0.72, left=left, color="white", alpha=0.3 * alpha + 0.1, lw=0, zorder=order)


def _name(segment: Segment) -> str:
    tokens = segment.stop - segment.start
    if segment.grid is None:
        return f"{segment.modality}\n{tokens:,}"
    grid = segment.grid
    frames = f"{grid.frames} × " if segment.modality is Modality.VIDEO else ""
    return f"{segment.modality}\n{frames}{f'{grid.rows} × ' if grid.raster else ''}{grid.cols}"


def draw_visited_tiles(
    ax: Axes,
    plan: BlockPlan,
    head: int,
    modality_map: ModalityMap,
    *,
    title: str = "",
    bin_size: int | None = None,
    detail: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Any:
    """Draw the share of every square of (query, key) pairs that `head` visits, with the modalities along both axes.

    Args:
        bin_size: rows and keys along a side of a square; None: as many as give `BINS` squares.
        detail: [start, stop) of rows and of keys to show larger in the empty half above the diagonal.

    Returns:
        the image, for a colour bar.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.ticker import MaxNLocator

    length = plan.num_rows
    # Half of the colours are for shares below a quarter, because thin lines of single cells would drown in white.
    colours, norm = LinearSegmentedColormap.from_list("visited", VISITED_COLOURS), PowerNorm(0.5, 0, 1)

    def show(axes: Axes, rows: tuple[int, int], keys: tuple[int, int], size: int) -> Any:
        share = visited_share(plan, head, size, rows, keys)
        picture = share.numpy() if share.numel() else [[float("nan")]]
        high, wide = max(share.shape[0], 1) * size, max(share.shape[1], 1) * size
        extent = (keys[0], keys[0] + wide, rows[0] + high, rows[0])
        return axes.imshow(picture, extent=extent, cmap=colours, norm=norm, interpolation="nearest", aspect="equal")

    image = show(ax, (0, length), (0, length), bin_size or max(1, -(-length // BINS)))
    band, gap = 0.025 * max(length, 1), 0.012 * max(length, 1)
    thinnest = length / 200
    for segment in modality_map.segments:
        if segment.start >= length:
            break
        stop = min(segment.stop, length)
        size = max(stop - segment.start, thinnest)
        start = (segment.start + stop - size) / 2
        order = 3 if segment.modality is Modality.TEXT else 2
        style: dict[str, Any] = {"color": COLOURS[segment.modality], "lw": 0, "zorder": order}
        ax.barh(-gap - band / 2, size, band, left=start, **style)
        ax.bar(-gap - band / 2, size, band, bottom=start, **style)
    ax.set_xlim(-gap - band, max(length, 1))
    ax.set_ylim(max(length, 1), -gap - band)
    ax.set_xlabel("key (tokens)", fontsize=9)
    ax.set_ylabel("query (tokens)", fontsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_major_locator(MaxNLocator(5, integer=True))
    ax.tick_params(labelsize=8)
    for side in ax.spines.values():
        side.set_visible(False)
    if detail is not None:
        (r0, r1), (k0, k1) = detail
        inset = ax.inset_axes((0.6, 0.48, 0.37, 0.37))
        show(inset, detail[0], detail[1], max(1, -(-(r1 - r0) // DETAIL_BINS)))
        inset.set_xlim(k0, k1)
        inset.set_ylim(r1, r0)
        inset.set_xticks([])
        inset.set_yticks([])
        inset.set_title(f"queries {r0:,} to {r1:,}\nkeys {k0:,} to {k1:,}", fontsize=6.5, pad=2)
        ax.indicate_inset((k0, r0, k1 - k0, r1 - r0), inset, edgecolor="#c0392b", lw=0.9, alpha=1.0)
    if title:
        ax.set_title(title, fontsize=9, loc="left")
    return image


def detail_window(modality_map: ModalityMap, dense_below: int = 0) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(rows, keys) of a small square far below the diagonal: three frames of the last video by three of the first.

    None if no video has 4 frames, or if the square would touch the diagonal or rows below `dense_below`.
    """
    videos = [s.grid for s in modality_map.segments if s.modality is Modality.VIDEO and s.grid and s.grid.frames >= 4]
    if not videos:
        return None
    first, last = videos[0], videos[-1]
    side = min(3 * first.cells, 3 * last.cells, 4096)
    rows, keys = last.frame_starts[last.frames * 2 // 3], first.frame_starts[first.frames // 4]
    if keys + side >= rows or rows < dense_below or rows + side > modality_map.length:
        return None
    return (rows, rows + side), (keys, keys + side)


def conversation_figure(
    modality_map: ModalityMap,
    turns: Sequence[Turn],
    heads: Sequence[tuple[str, HeadPattern]],
    *,
    dense_below: int = 0,
    title: str = "",
) -> Figure:
    """One picture: the map with chunks and cached prefixes by turn, a closer look at it, and heads' visited tiles.

    Args:
        heads: (title, pattern) of each head to draw. Static patterns only.
        dense_below: rows below this position see everything, as in the head config that was served.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = max(len(heads), 1)
    strip = 0.9 + 0.42 * max(len(turns), 1)
    zoom = busiest_stretch(modality_map)
    heights = [strip, *([strip + 0.2] if zoom else []), *([4.4] if heads else [])]
    width = max(12.0, 4.3 * columns)
    # Without pyplot the caller's backend stays as it is, and no figure has to be closed.
    figure = Figure(figsize=(width, sum(heights) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(len(heights), columns, height_ratios=heights)

    turn_axes = figure.add_subplot(outer[0, :])
    draw_map_strip(turn_axes, modality_map, turns)
    turn_axes.set_title("The conversation, turn by turn", fontsize=10, loc="left", fontweight="bold")
    if zoom:
        closer = figure.add_subplot(outer[1, :])
        draw_map_strip(closer, modality_map, turns, limits=zoom, names=True)
        name = f"A closer look at tokens {zoom[0]:,} to {zoom[1]:,}"
        closer.set_title(name, fontsize=10, loc="left", fontweight="bold")
    if heads:
        plan = plan_of(modality_map, [pattern for _, pattern in heads], dense_below)
        length = max(modality_map.length, 1)
        density = plan.visited_by_row.sum(dim=0).double() / (length * (length + 1) / 2)
        axes, window = [], detail_window(modality_map, dense_below)
        image: Any = None
        for number, (name, _) in enumerate(heads):
            axes.append(figure.add_subplot(outer[-1, number]))
            text = f"{name}\ndensity {float(density[number]):.2f} of the causal pairs"
            image = draw_visited_tiles(axes[-1], plan, number, modality_map, title=text, detail=window)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
        bar.set_label("share of the pairs that is visited", fontsize=9)
        bar.ax.tick_params(labelsize=8)

    legend: list[Any] = [Patch(color=COLOURS[m], label=m.value) for m in COLOURS]
    legend.append(Patch(color=COLOURS[Modality.VIDEO], alpha=CACHED_ALPHA, label="pale: from the radix cache"))
    legend.append(Line2D([], [], color="black", lw=1.2, label="chunk boundary"))
    if any(s.grid is not None and s.grid.frames > 1 for s in modality_map.segments):
        legend.append(Patch(facecolor="#3b7fc4", hatch="||", edgecolor="#a9c8e8", lw=0, label="stripes: frames"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8.5, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 200) -> Path:
    """Write the figure, and make its folder. Returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=dpi, facecolor="white")
    return target

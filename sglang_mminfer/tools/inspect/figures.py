"""The pictures of `mminfer inspect`: attention against visited tiles, losses by row, all heads at a glance.

Each function takes plain arrays and returns a figure; `figures.save` writes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.dense import BY_CONFIG
from sglang_mminfer.tools.figures import COLOURS, VISITED_COLOURS, Turn, draw_map_strip
from sglang_mminfer.tools.inspect.reasons import (
    ALL_DENSE,
    BELOW,
    MODALITY,
    PATTERN_REASONS,
    REASONS,
    START,
    TILES,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 1e-4
"""Smaller shares of a row's attention are drawn as this one."""

REASON_COLOURS = {
    BELOW: "#7f7f7f",
    BY_CONFIG: "#222222",
    MODALITY: "#17becf",
    ALL_DENSE: "#aaaaaa",
    START: "#bcbd22",
    TILES: "#56b4e9",
    **dict(
        zip(
            PATTERN_REASONS,
            itertools.cycle(("#6a51a3", "#8c564b", "#d55e00", "#cc79a7", "#2ca02c", "#1f77b4", "#e377c2", "#9467bd")),
        )
    ),
}
ROW_BINS = 160


@dataclass(frozen=True)
class HeadData:
    """The record of one head.

    words:      the pattern, in words.
    order:      int64 [length], the positions in the head's own order, named `order_name`.
    squares:    order ("original" or "permuted") -> name -> sums over squares, float64 [bins, bins].
    position, recall, error, norm: one value for each sampled row.
    """

    layer: int
    head: int
    words: str
    order_name: str
    order: np.ndarray
    squares: Mapping[str, Mapping[str, np.ndarray]]
    position: np.ndarray
    recall: np.ndarray
    error: np.ndarray
    norm: np.ndarray
    visited_by_row: np.ndarray
    """int64: how many keys each row visits, from `first_row` on; earlier rows came from the radix cache."""
    first_row: int = 0

    @property
    def title(self) -> str:
        return f"layer {self.layer}, head {self.head}"

    @property
    def density(self) -> float:
        """Visited over causal pairs of all rows from `first_row` on."""
        return float(self.visited_by_row.sum() / max(int(self.causal_by_row.sum()), 1))

    @property
    def causal_by_row(self) -> np.ndarray:
        """int64: how many keys each row from `first_row` on may see."""
        return self.first_row + 1 + np.arange(len(self.visited_by_row))

    @property
    def mean_recall(self) -> float:
        return float(self.recall.mean())

    @property
    def relative_error(self) -> float:
        """|o - o_dense| / |o_dense|, the norms taken over all sampled rows."""
        return float(np.sqrt((self.error**2).sum() / max((self.norm**2).sum(), 1e-30)))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # without pyplot, no figure has to be closed
    FigureCanvasAgg(figure)
    return figure


def _modality_patches() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=COLOURS[modality], label=modality.value) for modality in COLOURS]


def map_figure(modality_map: ModalityMap, turn: Turn) -> Figure:
    """The modality map with its frames, and the chunks in which the prompt was prefilled."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = _figure(12, 2.6)
    draw_map_strip(figure.add_subplot(), modality_map, [turn] if turn.chunks else [])
    legend = [*_modality_patches(), Line2D([], [], color="black", lw=1.2, label="chunk boundary")]
    if any(s.grid is not None and s.grid.frames > 1 for s in modality_map.segments):
        legend.append(Patch(facecolor="#3b7fc4", hatch="||", edgecolor="#a9c8e8", lw=0, label="stripes: frames"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    return figure


def overview_figure(density: np.ndarray, recall: np.ndarray, error: np.ndarray, layers: list[int]) -> Figure:
    """Three mosaics [layers, heads], side by side. Small mosaics show their values as text."""
    rows, heads = density.shape
    figure = _figure(min(18.0, max(9.5, 3 * (1.2 + 0.5 * heads))), min(14.0, max(2.6, 1.3 + 0.34 * rows)))
    for ax, (name, values, colours, low, high) in zip(
        figure.subplots(1, 3),
        (
            ("density (visited / causal pairs)", density, "Blues", 0.0, 1.0),
            ("recall (share of attention visited)", recall, "RdYlGn", 0.0, 1.0),
            ("output error, relative to dense", error, "Reds", 0.0, max(0.05, float(error.max(initial=0.0)))),
        ),
    ):
        image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        if rows * heads <= 128:
            for i in range(rows):
                for j in range(heads):
                    shade = (values[i, j] - low) / (high - low)
                    dark = shade > 0.6 if colours != "RdYlGn" else shade < 0.15 or shade > 0.9
                    text = f"{values[i, j]:.2f}"
                    ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        ax.set_title(name, fontsize=10, loc="left")
        ax.set_xlabel("head", fontsize=9)
        ax.set_ylabel("layer", fontsize=9)
        step = max(1, rows // 16)
        ax.set_yticks(range(0, rows, step), [str(layer) for layer in layers[::step]], fontsize=8)
        ax.set_xticks(range(0, heads, max(1, heads // 16)))
        ax.tick_params(labelsize=8)
        figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02).ax.tick_params(labelsize=8)
    return figure


def head_figure(data: HeadData, modality_map: ModalityMap) -> Figure:
    """Attention, visited pairs and lost attention; above in the order of the prompt, below in the head's own order."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, PowerNorm

    figure = _figure(14.5, 10.2)
    visited_colours = LinearSegmentedColormap.from_list("visited", VISITED_COLOURS)
    columns: tuple[tuple[str, str, Any, Any, str], ...] = (
        ("real attention", "mass", "magma", LogNorm(LEAST, 1), "share of a row's attention in the square"),
        ("visited", "visited", visited_colours, PowerNorm(0.5, 0, 1), "share of the causal pairs that is visited"),
        ("lost attention", "lost", "Reds", LogNorm(LEAST, 1), "share of a row's attention, lost"),
    )
    axes = figure.subplots(2, 3)
    length = modality_map.length
    for row, (key, order, order_name) in enumerate(
        (
            ("original", np.arange(length), "order of the prompt"),
            ("permuted", data.order, "the head's own order"),
        )
    ):
        squares = data.squares[key]
        rows = squares["mass"].sum(
            axis=1, keepdims=True
        )  # the number of sampled rows, because a row's attention sums to 1
        for ax, (title, name, colours, norm, label) in zip(axes[row], columns):
            denominator = squares["causal"] if name == "visited" else np.broadcast_to(rows, squares[name].shape)
            share = np.where(squares["causal"] > 0, squares[name] / np.maximum(denominator, 1e-30), np.nan)
            if name != "visited":
                share = np.maximum(share, LEAST)
            extent = (0, length, length, 0)
            image = ax.imshow(share, extent=extent, cmap=colours, norm=norm, interpolation="nearest", aspect="equal")
            _bands(ax, modality_map, order)
            ax.set_title(f"{title}, {order_name}", fontsize=10, loc="left")
            unit = "position" if key == "original" else "place in that order"
            ax.set_xlabel(f"key, {unit} (tokens)", fontsize=9)
            ax.set_ylabel(f"query, {unit} (tokens)", fontsize=9)
            bar = figure.colorbar(image, ax=ax, shrink=0.78, pad=0.02)
            bar.set_label(label, fontsize=8)
            bar.ax.tick_params(labelsize=8)
    figure.legend(handles=_modality_patches(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(
        f"{data.title}: {_short(data.words)}\nown order: {data.order_name}\n"
        f"density {data.density:.3f}, recall {data.mean_recall:.3f}, output error {data.relative_error:.3f}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    return figure


def rows_figure(data: HeadData, modality_map: ModalityMap, reasons: np.ndarray) -> Figure:
    """Along the prompt: recall of the sampled rows, share of visited keys, and why rows saw everything."""
    from matplotlib.patches import Patch

    length = len(data.visited_by_row)
    figure = _figure(12, 7.2)
    recall, share, reason_axes, strip = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 2, 1.1))
    recall.scatter(data.position, data.recall, s=5, color="#0b3c6f", alpha=0.5, lw=0)
    recall.set_ylim(-0.03, 1.03)
    recall.set_ylabel("recall\n(share of the\nattention)", fontsize=9)
    recall.set_title("each dot is a sampled row", fontsize=9, loc="left")
    edges = np.unique(np.linspace(0, length, min(ROW_BINS, length) + 1).astype(int))
    left, width = edges[:-1], np.diff(edges)
    positions = left + data.first_row
    visited = data.visited_by_row / data.causal_by_row
    share.bar(positions, np.add.reduceat(visited, left) / width, width, align="edge", color="#0b3c6f", lw=0)
    share.set_ylim(0, 1.05)
    share.set_ylabel("keys visited\n(share of\ncausal)", fontsize=9)
    bottom = np.zeros(len(left))
    seen: list[str] = []
    for reason in REASONS:
        part = np.add.reduceat((reasons == reason).astype(float), left) / width
        if part.any():
            reason_axes.bar(positions, part, width, bottom=bottom, align="edge", color=REASON_COLOURS[reason], lw=0)
            bottom, seen = bottom + part, [*seen, reason]
    reason_axes.set_ylim(0, 1.05)
    reason_axes.set_ylabel("rows that see\neverything\n(share)", fontsize=9)
    draw_map_strip(strip, modality_map)
    for ax in (recall, share, reason_axes):
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    patches = [*_modality_patches(), *(Patch(color=REASON_COLOURS[reason], label=reason) for reason in seen)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    figure.suptitle(f"{data.title}: {_short(data.words)}", fontsize=11, x=0.01, ha="left")
    return figure


def _bands(ax: Axes, modality_map: ModalityMap, order: np.ndarray) -> None:
    """Draw the modality of every place in an order as bands along both axes, outside the matrix."""
    from matplotlib.ticker import MaxNLocator

    length = max(len(order), 1)
    band, gap, thinnest = 0.025 * length, 0.012 * length, length / 200
    kinds = np.array([list(COLOURS).index(s.modality) for s in modality_map.segments])
    kind = kinds[modality_map.segment_ids.numpy()[order]]
    edges = np.concatenate([[0], np.flatnonzero(np.diff(kind)) + 1, [len(order)]])
    for start, stop in itertools.pairwise(edges):
        modality = list(COLOURS)[kind[start]]
        size = max(stop - start, thinnest)
        first = (start + stop - size) / 2
        style: dict[str, Any] = {"color": COLOURS[modality], "lw": 0, "zorder": 3 if modality is Modality.TEXT else 2}
        ax.barh(-gap - band / 2, size, band, left=first, **style)
        ax.bar(-gap - band / 2, size, band, bottom=first, **style)
    ax.set_xlim(-gap - band, length)
    ax.set_ylim(length, -gap - band)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_major_locator(MaxNLocator(4, integer=True))
    ax.tick_params(labelsize=8)
    for side in ax.spines.values():
        side.set_visible(False)


def _short(words: str, most: int = 130) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"

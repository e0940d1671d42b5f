"""A picture of a prompt: its segments to scale, what was cached pale, frames ticked. An SVG of a few hundred bytes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sglang_mminfer.serving.trace import MapEntry

COLOURS = {"text": "#64748b", "image": "#d97706", "video": "#2563eb"}
"""Colours of the segments, by modality."""

WIDTH, HEIGHT = 1000.0, 18.0

LEAST_WIDTH = 1.5
"""No segment is drawn narrower: a question of ten tokens after an hour of video must be seen."""

LEAST_FRAME = 4.0
"""Frames narrower than this are not ticked one by one."""

PALE = 0.3


def strip(entries: Sequence[MapEntry], cached: int) -> str:
    """The picture.

    Args:
        entries: the prompt's segments, without gaps.
        cached: tokens at its start that were not computed.
    """
    if not entries:
        return ""
    total = entries[-1].stop
    scale = WIDTH / total
    drawn = [shape for entry in entries for shape in _segment(entry, cached, scale)]
    if 0 < cached < total:
        x = cached * scale
        drawn.append(f'<path d="M{x:.1f} 0V{HEIGHT:g}" stroke="currentColor" stroke-width="2"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" class="mminfer-strip" role="img" '
        f'aria-label="{escape(described(entries, cached))}">{"".join(drawn)}</svg>'
    )


def described(entries: Sequence[MapEntry], cached: int) -> str:
    """The same in words."""
    named = ", ".join(f"{entry.stop - entry.start:,} {entry.modality}" for entry in entries)
    return f"{named}; the first {cached:,} cached"


def _segment(entry: MapEntry, cached: int, scale: float) -> list[str]:
    colour = COLOURS.get(entry.modality, "#888888")
    edge = min(max(cached, entry.start), entry.stop)
    shapes = [
        f'<rect x="{start * scale:.1f}" width="{max((stop - start) * scale, LEAST_WIDTH):.1f}" height="{HEIGHT:g}" '
        f'fill="{colour}"{f" opacity={chr(34)}{PALE}{chr(34)}" if pale else ""}><title>{escape(_title(entry))}</title>'
        "</rect>"
        for start, stop, pale in ((entry.start, edge, True), (edge, entry.stop, False))
        if stop > start
    ]
    return [*shapes, *_ticks(entry, scale)]


def _ticks(entry: MapEntry, scale: float) -> list[str]:
    """A line before each frame but the first. Frames that lie apart, with timestamps between them, are ticked evenly:
    the trace does not say where they begin."""
    frames = entry.grid[0] if entry.grid else 1
    step = (entry.stop - entry.start) * scale / frames
    if frames < 2 or step < LEAST_FRAME:
        return []
    lines = "".join(f"M{entry.start * scale + i * step:.1f} 0V{HEIGHT:g}" for i in range(1, frames))
    return [f'<path d="{lines}" stroke="#ffffff" stroke-width="0.7"/>']


def _title(entry: MapEntry) -> str:
    size = f"{entry.modality}: {entry.stop - entry.start:,} tokens, {entry.start:,} to {entry.stop:,}"
    if entry.grid is None:
        return size
    frames, rows, cols = entry.grid
    return f"{size}; {frames} x {rows} x {cols}" if entry.raster else f"{size}; {frames} frames"

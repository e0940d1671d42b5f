"""One HTML page with everything in it: pictures as base64, styles inline, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em; }
img { max-width: 100%; height: auto; } p.note { color: #555; } p.warning { color: #b00020; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; border-bottom: 1px solid #e4e4e4; }
th { text-align: left; background: #f6f6f6; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
</style></head>
<body>
<h1>{{ title }}</h1>
{%- for kind, part in parts %}
{%- if kind == "table" %}
<table><thead><tr>{% for column in part.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in part.rows %}<tr>
{%- for cell in row %}<td{% if cell is not string %} class="number"{% endif %}>{{ cell | shown }}</td>{% endfor -%}
</tr>{% endfor %}</tbody></table>
{%- elif kind == "picture" %}
<p><img alt="{{ part.what }}" src="data:image/png;base64,{{ part.data }}"></p>
{%- elif kind == "heading" %}
<h2>{{ part }}</h2>
{%- else %}
<p class="{{ kind }}">{{ part }}</p>
{%- endif %}
{%- endfor %}
</body>
</html>
"""


class Page:
    """A page that grows from top to bottom. All text is escaped."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        """Add a heading."""
        self._parts.append(("heading", text))

    def note(self, text: str) -> None:
        """Add a paragraph in grey."""
        self._parts.append(("note", text))

    def warning(self, text: str) -> None:
        """Add a paragraph in red."""
        self._parts.append(("warning", text))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table. Cells that are int or float stand to the right, floats with three places; None is a dash."""
        self._parts.append(("table", {"columns": columns, "rows": [list(row) for row in rows]}))

    def picture(self, source: Path | Any, what: str) -> None:
        """Embed a PNG file or a matplotlib figure. `what` describes it to readers who do not see it."""
        png = source.read_bytes() if isinstance(source, Path) else _drawn(source)
        self._parts.append(("picture", {"what": what, "data": base64.b64encode(png).decode()}))

    def html(self) -> str:
        """The whole page."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        environment.filters["shown"] = _shown
        return environment.from_string(_TEMPLATE).render(title=self._title, parts=self._parts)

    def write(self, path: Path) -> Path:
        """Write the page, and return its path."""
        path.write_text(self.html(), encoding="utf-8")
        return path


def _drawn(figure: Any) -> bytes:
    from matplotlib import pyplot

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return png.getvalue()


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)

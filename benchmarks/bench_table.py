"""Tables for people; for scripts that have no torch, too."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table whose columns are also aligned as plain text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(r) for r in rows)])

"""Tables as Markdown, aligned so that they read well as plain text, too."""

from __future__ import annotations

from collections.abc import Iterable

from trace_analysis.tables import Table


def document(title: str, tables: Iterable[Table]) -> str:
    return "\n\n".join([f"# {title}", *map(_section, tables)]) + "\n"


def _section(table: Table) -> str:
    lines = [f"## {table.title}", ""]
    if table.rows:
        cells = [table.header, *(tuple(map(_escaped, row)) for row in table.rows)]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(table.header))]
        ruler = ["-" * width if i < table.text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        for row in (cells[0], ruler, *cells[1:]):
            padded = [
                cell.ljust(width) if i < table.text else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"| {' | '.join(padded)} |")
        lines.append("")
    lines += [_escaped(note) for note in table.notes]
    return "\n".join(lines).rstrip()


def _escaped(text: str) -> str:
    """No cell's end, no HTML and no link out of a name in a file."""
    for character in "\\|<[":
        text = text.replace(character, f"\\{character}")
    return text

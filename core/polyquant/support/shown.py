"""How what polyquant returns looks where Python shows it: a sentence and a table; in a notebook as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GAP = "  "  # between columns


class Look(NamedTuple):
    """A sentence, a table below it, and notes below that."""

    sentence: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """In lines, for a terminal of a fixed width of characters."""
        lines = [self.sentence]
        if self.rows:
            table = [[" ".join(cell.split("\n")) for cell in row] for row in (self.headings, *self.rows)]
            widths = [max(len(row[column]) for row in table) for column in range(len(self.headings))]
            padded = (GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
            lines += [f"{GAP}{line}".rstrip() for line in padded]
        return "\n".join([*lines, *(f"{GAP}note: {note}" for note in self.notes)])

    def html(self) -> str:
        """For a notebook."""
        from html import escape

        parts = [f"<p>{escape(self.sentence)}</p>"]
        if self.rows:
            head = "".join(f"<th style='text-align: left'>{escape(heading)}</th>" for heading in self.headings)
            cells = ("".join(f"<td style='text-align: left'>{escape(cell)}</td>" for cell in row) for row in self.rows)
            body = "".join(f"<tr>{row}</tr>" for row in cells)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        if self.notes:
            parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in self.notes)}</ul>")
        return "".join(parts)


class Looked:
    """Shown by what `look` says, in place of all its fields."""

    __slots__ = ()

    def look(self) -> Look:
        """What is worth seeing of it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.look().text()

    def _repr_html_(self) -> str:
        return self.look().html()

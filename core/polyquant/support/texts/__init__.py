"""English prose that comes with polyquant: to calibrate with, and to measure on. Both are in the public domain.

persuasion.txt: Jane Austen, Persuasion (1818), chapters 1 to 12. northanger-abbey.txt: Jane Austen, Northanger Abbey
(1818), chapters 1 to 8. Headings, line breaks and italics are left out; a paragraph is a line, an empty one follows it.
Two books, so that nothing is measured on the text it was calibrated with; one author, so that calibration is
flattered a little: give texts of your own where that matters.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def evaluation_text() -> str:
    """The text that quality is measured on unless another is given; 214 kB."""
    return _read("persuasion.txt")


@cache
def calibration_text() -> str:
    """The text that backends calibrate with unless another is given; 84 kB."""
    return _read("northanger-abbey.txt")


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")

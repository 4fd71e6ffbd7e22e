"""rich's console as the commands use it: names are only text in it, neither markup nor what steers a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from polyquant.cli.output import visible, writing


def styled(template: str, *values: object) -> Text:
    """Markup of rich's, with values in its {} that mean nothing to it."""
    return Text.from_markup(template.format(*(escape(str(value)) for value in values)), emoji=False)


class Terminal(Console):
    """rich's console, for which text is only text."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=False, markup=False, emoji=False)

    def print(self, *objects: Any, **how: Any) -> None:
        with writing():
            super().print(*objects, **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

"""The table of backends. Of plain text, since importing rich would take half of the time of listing them."""

from __future__ import annotations

from collections.abc import Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING

from polyquant.cli.output import print_json, say
from polyquant.registry.installed import registry
from polyquant.types import BackendInfo, Capabilities

if TYPE_CHECKING:
    from polyquant.registry.catalogue import Quantizes
    from polyquant.registry.query import Selection

HEADINGS = ("backend", "bits", "schemes", "devices", "quantizes", "can", "reads")
SCHEMES_SHOWN = 4  # in a table; --json has them all
NARROW = 100  # columns of a terminal that has no room for what each backend reads
LEAST = 6  # columns of a table's column
GAP = "  "  # between columns
ABILITIES = ("saves", "trains", "compiles", "offloads")


def as_json(selection: Selection) -> None:
    print_json({"backends": list(selection), "misses": list(selection.misses)})


def as_table(selection: Selection, *, filtered: bool) -> None:
    """filtered: whether backends were asked for by what they can do."""
    if selection:
        width = get_terminal_size().columns
        shown = len(HEADINGS) - (width < NARROW)
        for line in lines([cells[:shown] for cells in (list(HEADINGS), *map(card_cells, selection))], width):
            say(line)
    elif filtered:
        say("No installed backend satisfies all of that. Nearest first:")
    elif not selection.misses:
        say("No backend is installed. Try: pip install polyquant-bitsandbytes")
    for miss in selection.misses:
        if miss.broken or not selection:
            say(f"  {miss.name} {'broken' if miss.broken else 'misses'}: {'; '.join(miss.reasons)}")


def lines(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows of cells in columns, folded where they take more than `width` letters; first cells are not."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + len(GAP) * (len(widths) - 1) > width and max(widths[1:]) > LEAST:
        widest = max(range(1, len(widths)), key=widths.__getitem__)
        widths[widest] -= 1
    found = []
    for row in rows:
        folded = [wrap(cell, size, break_on_hyphens=False) for cell, size in zip(row, widths, strict=True)]
        for part in range(max(map(len, folded))):
            cells = [(cell[part] if part < len(cell) else "").ljust(size)
                     for cell, size in zip(folded, widths, strict=True)]  # fmt: skip
            found.append(GAP.join(cells).rstrip())
    return found


def card_cells(info: BackendInfo) -> list[str]:
    """Name, bits, schemes, devices, how it quantizes, abilities, methods read, as tables show them."""
    can: Capabilities = info.capabilities
    more = len(can.schemes) - SCHEMES_SHOWN
    return [
        info.name,
        ranges(can.bits),
        " ".join(can.schemes[:SCHEMES_SHOWN]) + (f" +{more}" if more > 0 else ""),
        " ".join(device.type for device in can.devices),
        quantizes(info),
        " ".join(ability for ability in ABILITIES if getattr(can, ability)),
        " ".join(can.loads_prequantized),
    ]


def ranges(bits: Sequence[float]) -> str:
    """Bit widths with runs of whole numbers joined: '1 1.6 2-6 8'."""
    runs: list[list[float]] = []
    for width in sorted(bits):
        if runs and width == runs[-1][-1] + 1:
            runs[-1].append(width)
        else:
            runs.append([width])
    return " ".join(
        f"{run[0]:g}-{run[-1]:g}" if len(run) > 2 else " ".join(f"{each:g}" for each in run) for run in runs
    )


def quantizes(info: BackendInfo) -> Quantizes:
    """How a backend that is installed makes quantized weights, in a word."""
    if info.capabilities.on_the_fly:
        return "loading"
    if not registry().implements(info.name, "quantize"):
        return "no"
    return "calibrates" if info.capabilities.needs_calibration else "offline"

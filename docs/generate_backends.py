"""The page of each backend: what its card, its options and its measurements say."""

from __future__ import annotations

from collections.abc import Mapping

from polyquant.options import BackendOptions, Option, describe_options
from polyquant.registry.written import presets
from polyquant.types import BackendInfo, Library

NOTES = "<!-- notes -->"
"""From here on the site shows the package's README in place of the link to it."""


def backends_index(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """The page that leads to the others."""
    linked = [(f"[{name}]({name}.md)", *cells) for name, *cells in rows]
    return "\n\n".join([
        "# Backends",
        "What each declares; the conformance suite runs it. `polyquant backends` prints the same of what is installed. "
        "What was run where, and all figures in one table: [verified and measured](../reference/backends.md). Which to "
        "take: [choose a backend](../how-to/choose.md).",
        markdown(headings, linked),
    ]) + "\n"  # fmt: skip


def backend_page(info: BackendInfo, package: str, folder: str, measured: str, conditions: str) -> str:
    """All that is known of a backend; folder: its package's, below plugins/; measured: a table, or empty."""
    own, common = split(describe_options(info.options))
    parts = [
        f"# {info.name}",
        f"{info.summary[0].upper()}{info.summary[1:]}. `pip install {package}`; "
        f"[the library]({info.docs}).",
        "## Can",
        markdown(("capability", "value"), list(capability_rows(info))),
        "## Presets",
        markdown(("preset", "options"), [(f"`{name}`", written(options)) for name, options in presets(info).items()])
        if info.presets else "None: its options are given one by one.",
        f"In a candidate: `{info.name}:{next(iter(info.presets), '')}`; the first is what its name alone means.",
        "## Options",
        f'In Python `polyquant.load(model, "{info.name}", option=value)`, on the command line `--option value`.',
        markdown(("option", "allowed", "default", "meaning"), option_rows(own)) if own else "None of its own.",
        "Those of every backend:",
        markdown(("option", "allowed", "default", "meaning"), option_rows(common)),
        "Options that apply to a checkpoint that is quantized already: "
        + ", ".join(f"`{name}`" for name in sorted(info.options.load_time))
        + ". All others are stored in it.",
        "## Libraries",
        markdown(("library", "versions", "to know"), [library_row(library) for library in info.libraries])
        if info.libraries else "None of its own.",
        "## Measured",
        measured and f"{measured}\n\n{conditions} What the columns are: [all backends](../reference/backends.md).",
        "" if measured else "Not in the table of [all backends](../reference/backends.md) yet.",
        NOTES,
        f"What it reads and refuses, its kernels and its known faults: "
        f"[{package}](../../plugins/{folder}/README.md).",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def split(options: list[Option]) -> tuple[list[Option], list[Option]]:
    """The backend's own options, and those that every backend has."""
    shared = {option.name for option in describe_options(BackendOptions)}
    return ([option for option in options if option.name not in shared],
            [option for option in options if option.name in shared])  # fmt: skip


def capability_rows(info: BackendInfo) -> list[tuple[str, str]]:
    can = info.capabilities
    yes = {True: "yes", False: "no"}
    dtypes = ", ".join(f"{dtype} on {device}" for device, dtype in info.compute_dtypes.items())
    return [
        ("bits", ", ".join(f"{bits:g}" for bits in can.bits)),
        ("schemes", ", ".join(f"`{scheme}`" for scheme in can.schemes)),
        ("devices", ", ".join(map(str, can.devices))),
        ("quantizes while loading", yes[can.on_the_fly]),
        ("needs calibration text", yes[can.needs_calibration]),
        ("reads checkpoints of", ", ".join(f"`{method}`" for method in can.loads_prequantized)),
        ("saves what loads back bit for bit", yes[can.saves]),
        ("adapters train on it", yes[can.trains]),
        ("torch.compile", yes[can.compiles]),
        ("offloads to the CPU", yes[can.offloads]),
        ("runs on", can.runtime),
        ("compute dtype where none is asked for", dtypes or "by the device: see memory"),
    ]


def option_rows(options: list[Option]) -> list[tuple[str, ...]]:
    return [(f"`{option.name}`", allowed(option), f"`{option.default!r}`", option.description.replace("|", "\\|"))
            for option in options]  # fmt: skip


def allowed(option: Option) -> str:
    """The values or the type of an option."""
    values = ", ".join(f"`{value!r}`" for value in option.values)
    if option.kind == "table":
        return f"pattern to {values}"
    return " or ".join(part for part in (values, option.kind) if part)


def library_row(library: Library) -> tuple[str, str, str]:
    return library.distribution, library.versions.replace(",", ", ") or "any", library.caution


def written(options: Mapping[str, object]) -> str:
    return f"`{', '.join(f'{name}={value!r}' for name, value in options.items())}`" if options else "the defaults"


def markdown(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell or '-' for cell in row)} |" for row in lines)

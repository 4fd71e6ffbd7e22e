"""Writes what the docs derive from the code and from measurements. `--check` only says whether all is up to date."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
from generate_backends import backend_page, backends_index, markdown
from generate_foreseen import foreseen_picture, foreseen_table
from generate_gpu import GpuRun, read_gpu_run
from generate_machines import formats_table, machines_table, runtimes_table
from generate_oracles import oracles_page
from generate_peaks import peaks_table
from generate_picture import comparison_table, picture_text
from generate_reference import command_line_page, hooks_page, python_page, records_page
from generate_sizes import sizes_table
from pluggy import PluginManager
from polyquant.cli.show_backends import card_cells, quantizes
from polyquant.comparison.candidates import DENSE
from polyquant.comparison.records import Result
from polyquant.contract.hookspecs import OPTIONAL
from polyquant.contract.markers import PROJECT
from polyquant.models.marks import PATH as MARKS
from polyquant.registry.cards import FILE as CARD_FILE
from polyquant.registry.cards import Card
from polyquant.registry.cards import text as card_text
from polyquant.registry.catalogue import PATH as CATALOGUE
from polyquant.registry.catalogue import Known
from polyquant.registry.hooks import implementations
from polyquant.support.sizes import size
from polyquant.testing.oracles import read
from polyquant.types import BackendInfo

ROOT = Path(__file__).parent.parent
HEADINGS = ("backend", "bits", "schemes", "devices", "quantizes", "can", "reads checkpoints of", "tested with")
MEASURES = ("preset", "stored", "of bf16", "bits a weight", "KL (nats)", "top-1", "load s", "pp512", "tg128", "dtype",
            "kernel")  # fmt: skip
DOCS = ROOT / "docs"
MEASURED = DOCS / "reference" / "measured.json"
SIZES = DOCS / "reference" / "sizes.json"  # as docs/examples/sizes.py writes it
FORESEEN = DOCS / "reference" / "foreseen.json"  # as docs/examples/foresee.py writes it
PEAKS = DOCS / "reference" / "peaks.json"  # as docs/examples/peaks.py writes it
ORACLES = DOCS / "reference" / "oracles.json"  # as tests write it: see polyquant.testing.oracles
GPU = DOCS / "reference" / "gpu.json"  # as docs/examples/gpu.py writes it; where there is none, no GPU was at hand yet


class Plugin(NamedTuple):
    """A backend of this repository."""

    folder: str  # below plugins/
    package: str  # the distribution
    card: BackendInfo
    hooks: tuple[str, ...]  # the optional ones
    home: Path  # of its code


def main() -> None:
    wanted = pages()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    known = {"index", *(info.name for info in ours())}
    stale += [path for path in (DOCS / "backends").glob("*.md") if path.stem not in known]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(str(path.relative_to(ROOT)) for path in stale)}" if stale else 0)
    for path in stale:
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()


def pages() -> dict[Path, str]:
    """Every file that is written, with what belongs there."""
    results = msgspec.json.decode(MEASURED.read_bytes(), type=dict[str, Result])
    reference = DOCS / "reference"
    return {
        DOCS / "comparison.svg": picture_text(),
        DOCS / "foreseen.svg": foreseen_picture(FORESEEN),
        CATALOGUE: catalogue_text(),
        MARKS: marks_text(),
        reference / "backends.md": backends_page(results, read_gpu_run(GPU)),
        reference / "oracles.md": oracles_page(ours(), read(ORACLES), apart()),
        **marked_pages(),
        reference / "python.md": python_page(),
        reference / "command-line.md": command_line_page(),
        reference / "hooks.md": hooks_page(),
        reference / "records.md": records_page(),
        DOCS / "backends" / "index.md": backends_index(HEADINGS[:-1], [card_cells(info) for info in ours()]),
        **card_files(),
        **{DOCS / "backends" / f"{plugin.card.name}.md": page_of(plugin, results) for plugin in plugins()},
    }


def marked_pages() -> dict[Path, str]:
    """Pages that are written by hand around tables that are not."""
    cards = [Card(plugin.card, plugin.hooks) for plugin in plugins()]
    tables = {
        DOCS / "explanation" / "speed.md": {"foreseen": foreseen_table(FORESEEN)},
        DOCS / "reference" / "sizes.md": {"sizes": sizes_table(SIZES)},
        DOCS / "reference" / "formats.md": {"formats": formats_table(cards), "runtimes": runtimes_table(cards)},
        ROOT / "README.md": {"backends": backends_table(), "comparison": comparison_table()},
        DOCS / "explanation" / "memory.md": {"peaks": peaks_table(PEAKS)},
        DOCS / "how-to" / "machine.md": {"machines": machines_table(ours())},
    }
    return {path: with_tables(path.read_text(encoding="utf-8"), found) for path, found in tables.items()}


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page's text with the tables between their markers renewed."""
    for name, table in tables.items():
        head, rest = text.split(f"<!-- {name}:", 1)
        marker, _, rest = rest.partition("\n")
        tail = rest.split(f"<!-- end of {name} -->", 1)[1]
        text = f"{head}<!-- {name}:{marker}\n{table}\n<!-- end of {name} -->{tail}"
    return text


def page_of(plugin: Plugin, results: dict[str, Result]) -> str:
    """The page of one backend, with its rows of the measured table."""
    info = plugin.card
    names = [name for preset in info.presets if (name := f"{info.name}:{preset}") in results]
    rows = [measured_row(name, results[name]) for name in names]
    measured = markdown(MEASURES, rows) if rows else ""
    return backend_page(info, plugin.package, plugin.folder, measured, conditions(results))


@cache
def plugins() -> list[Plugin]:
    """This repository's backends by name, read from its folders, whatever is installed and runs here."""
    found = []
    for path in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        sys.path.insert(0, str(path.parent / "src"))
        for value in project["entry-points"]["polyquant.backends"].values():
            module, _, name = value.partition(":")
            plugin = getattr(importlib.import_module(module), name)
            marked = {each.hook for each in implementations(plugin, PluginManager(PROJECT).parse_hookimpl_opts)}
            hooks = tuple(hook for hook in OPTIONAL if hook in marked)
            home = path.parent / "src" / module.partition(".")[0]
            found.append(Plugin(path.parent.name, project["name"], plugin.backend_info(), hooks, home))
    return sorted(found, key=lambda plugin: plugin.card.name)


def apart() -> set[str]:
    """The backends whose tests run in an environment of their own."""
    files = {plugin.card.name: ROOT / "plugins" / plugin.folder / "pyproject.toml" for plugin in plugins()}
    return {name for name, path in files.items() if "[tool.polyquant.development]" in path.read_text(encoding="utf-8")}


def ours() -> list[BackendInfo]:
    """The cards of this repository's backends."""
    return [plugin.card for plugin in plugins()]


def catalogue_text() -> str:
    """What the core knows of backends that are not installed."""
    lines = [f'  "{plugin.card.name}": {msgspec.json.encode(known(plugin)).decode()}' for plugin in plugins()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def card_files() -> dict[Path, str]:
    """Beside the code of each package, the cards of its backends."""
    packages: dict[Path, dict[str, Card]] = {}
    for plugin in plugins():
        packages.setdefault(plugin.home, {})[plugin.card.name] = Card(plugin.card, plugin.hooks)
    return {home / CARD_FILE: card_text(home, cards) for home, cards in packages.items()}


def marks_text() -> str:
    """What tells checkpoints of these backends, for the core, which knows it of those that are not installed too."""
    lines = [f"  {msgspec.json.encode(mark).decode()}" for card in ours() for mark in card.marks]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def known(plugin: Plugin) -> Known:
    """The catalogue's entry of a backend."""
    card = plugin.card
    return Known(
        package=plugin.package,
        libraries=tuple(library.distribution for library in card.libraries),
        reads=card.capabilities.loads_prequantized,
        also_called=card.also_called,
        quantizes=quantizes(card),
        isolated=card.isolated is not None,
    )


def backends_table() -> str:
    """The README's."""
    rows = []
    for plugin in plugins():
        libraries = plugin.card.libraries
        tested = ", ".join(f"{library.distribution} {library.versions}".strip() for library in libraries)
        name, *cells = card_cells(plugin.card)
        rows.append((f"[{name}](plugins/{plugin.folder}/README.md)", *cells, tested))
    return markdown(HEADINGS, rows)


def backends_page(results: dict[str, Result], gpu: GpuRun | None) -> str:
    """The page of what was verified and measured, with the machine beside the figures."""
    others = "Other devices that a backend declares have not been run."
    if gpu is not None:
        others = (
            f"{gpu.conditions} There with tiny models; why a backend is not verified there stands in the last column."
        )
    return "\n\n".join([
        "# Backends: verified and measured",
        "Written by `python docs/generate.py` from the backends' cards and from `measured.json`, which "
        "`python docs/examples/measure.py` writes.",
        "## Verified",
        "Verified: the conformance suite's promises hold there (`nox -s tests`), and every figure below comes from a "
        f"model that was loaded and checked there. {others}",
        markdown(("backend", "verified on", "with", "declared, not run"), list(verified_rows(results, gpu))),
        "## Measured",
        conditions(results),
        markdown(
            MEASURES,
            [measured_row(name, results[name]) for name in in_order(results)],
        ),
        "stored: bytes of the whole model, embeddings included (dense in most backends). bits a weight: of the "
        "quantized tensors, scales included. KL: mean KL(dense float32 || preset) with its standard error. pp512, "
        "tg128: prompt and generated tokens a second as llama-bench defines them, mean with standard deviation; "
        "models below 11 tokens/s generated fewer than 128.",
        "[Why some figures are out of line](../explanation/figures.md).",
    ]) + "\n"  # fmt: skip


def verified_rows(results: dict[str, Result], gpu: GpuRun | None) -> Iterator[tuple[str, ...]]:
    for plugin in plugins():
        info = plugin.card
        found = [result for name, result in results.items() if name.startswith(f"{info.name}:") and result.machine]
        on = {result.device.partition(":")[0] for result in found if result.device}
        on |= {gpu.kind} if gpu is not None and info.name in gpu.verified else set()
        versions = found[0].machine.versions if found and found[0].machine else {}
        named = [f"{library.distribution} {versions[library.distribution]}" for library in info.libraries
                 if library.distribution in versions]  # fmt: skip
        reason = {gpu.kind: gpu.reasons.get(info.name, "")} if gpu is not None else {}
        rest = [f"{device.type} ({why})" if (why := reason.get(device.type)) else device.type
                for device in info.capabilities.devices if device.type not in on]  # fmt: skip
        link = f"[{info.name}](../../plugins/{plugin.folder}/README.md)"
        yield (
            link,
            " ".join(sorted(on)),
            ", ".join(named) or ("no library of its own" if found else "not measured yet"),
            " ".join(rest),
        )


def conditions(results: dict[str, Result]) -> str:
    """The model, the text and the machines, in a sentence."""
    machines = sorted({
        f"{m.processor}, {m.cores} of its cores, torch {m.versions['torch']}, transformers {m.versions['transformers']}"
        for result in results.values() if (m := result.machine)
    })  # fmt: skip
    quality = next(result.quality for result in results.values() if result.quality)
    threads = sorted({result.threads for result in results.values() if result.threads})
    return (
        "SmolLM2-135M-Instruct (`builtin:smollm2`: its weights were 4-bit once already, so 4 bit looks better here "
        f"than it is, Q4_1 above all); {quality.preset}, {quality.tokens_scored} positions of the packaged text, "
        f"reference: dense float32. {'; '.join(machines)}; {' or '.join(map(str, threads))} threads."
    )


def in_order(results: dict[str, Result]) -> list[str]:
    """The dense model first, then the backends by name, presets as their cards have them."""
    order = [name for name in results if name.startswith(f"{DENSE}:")]
    for info in ours():
        order += [name for preset in info.presets if (name := f"{info.name}:{preset}") in results]
    return order


def measured_row(name: str, result: Result) -> tuple[str, ...]:
    if result.status != "done":
        return (f"`{name}`", f"failed: {result.reason}", *[""] * 9)
    memory, quality, speed = result.memory, result.quality, result.speed
    rates = [f"{rate.mean:.1f} ± {rate.standard_deviation:.1f}"
             for rate in (speed.prompt_tokens_per_second, speed.generated_tokens_per_second)]  # fmt: skip
    failed = [check.name for check in result.checks if not check.passed]
    return (
        f"`{name}`" + (f" (fails: {', '.join(failed)})" if failed else ""),
        size(memory.weights_stored_bytes) if memory else "",
        f"{memory.ratio_to_bfloat16:.2f}x" if memory else "",
        f"{result.bits_per_weight:.2f}" if result.bits_per_weight else "",
        f"{quality.kl_mean:.4f} ± {quality.kl_standard_error:.4f}",
        f"{quality.top1:.3f}",
        f"{result.load_seconds:.1f}",
        *rates,
        result.compute_dtype,
        result.kernel,
    )


if __name__ == "__main__":
    main()

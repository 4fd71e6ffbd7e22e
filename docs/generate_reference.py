"""The pages of the reference: public names, commands, hooks, records."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any

import msgspec
import polyquant
import polyquant.testing
import typer
from generate_backends import allowed, markdown
from polyquant.cli.build import build
from polyquant.contract import hookspecs
from polyquant.options import describe_options

GROUPS = {
    "Select": ("backends", "backend", "Backend", "doctor", "Diagnosis"),
    "Plan": ("plan", "recommend"),
    "Search": ("search",),
    "Load, verify, run": ("load", "LoadedModel", "verify", "quantize"),
    "Compare": ("compare", "read_comparison", "difference"),
    "Fine-tune": ("finetune", "merge"),
    "Write and watch backends": ("hookimpl", "observing"),
}
RECORDS = {
    "polyquant.types": "What travels between core and plugins.",
    "polyquant.loading.records": "What `polyquant.verify` returns.",
    "polyquant.planning.records": "What `polyquant.plan` and `polyquant.recommend` return.",
    "polyquant.searching.records": "What `polyquant.search` returns.",
    "polyquant.converting.records": "What `polyquant.convert` returns.",
    "polyquant.comparison.records": "What `polyquant.compare` returns: a `Comparison`, which is a `Run` with the "
    "methods `best`, `gate`, `report`, `picture` and `to_pandas`; and what it is made of.",
    "polyquant.comparison.gate": "What `Comparison.gate` is told and returns.",
    "polyquant.comparison.report.difference": "What `polyquant.difference` returns, beside the method `report`.",
    "polyquant.support.progress": "What a `progress` sees of work while it goes on.",
    "polyquant.comparison.candidates": "What is compared.",
    "polyquant.measure.quality.records": "The measured quality of a model.",
    "polyquant.measure.speed": "The measured speed of a model.",
    "polyquant.support.machine": "What a figure was measured on.",
    "polyquant.finetuning.options": "What `polyquant.finetune` is told and returns.",
    "polyquant.request": "What a backend's `load` is asked for.",
}
HEAD = "<!-- Written by `python docs/generate.py`. -->"


def python_page() -> str:
    """The public names, for mkdocstrings to fill in."""
    rest = tuple(sorted(set(polyquant.__all__) - {name for names in GROUPS.values() for name in names}))
    parts = ["# Python", HEAD, "Public are the names that `polyquant.__all__` and `polyquant.testing.__all__` have, "
             "the [records](records.md) and the [errors](errors.md); what may change and how is said [for "
             "authors](../authors/index.md#what-is-public-and-what-may-change)."]  # fmt: skip
    for title, names in {**GROUPS, **({"More": rest} if rest else {})}.items():
        parts += [f"## {title}", *(entry(polyquant, name) for name in names)]
    parts += ["## polyquant.testing", "What backend authors use; `polyquant check-backend` runs the same."]
    parts += [entry(polyquant.testing, name) for name in polyquant.testing.__all__]
    return "\n\n".join(parts) + "\n"


def entry(module: Any, name: str) -> str:
    if module is polyquant.testing and name in polyquant.testing._HOMES:  # not imported: the suite imports pytest
        home = f"{module.__name__}.{polyquant.testing._HOMES[name]}.{name}"
    elif hasattr(thing := getattr(module, name), "__qualname__"):
        home = f"{thing.__module__}.{thing.__qualname__}"
    else:
        home = f"{module.__name__}.{name}"
    return f"::: {home}\n    options:\n      heading_level: 3\n      show_root_full_path: false"


def hooks_page() -> str:
    """The hook specification, with which hooks are required."""
    hooks = {"required": hookspecs.REQUIRED, "optional": hookspecs.OPTIONAL}
    home = hookspecs.QuantBackend
    where = "#polyquant.contract.hookspecs.QuantBackend"
    rows = [(f"[`{name}`]({where}.{name})", kind, first_sentence(getattr(home, name)))
            for kind, names in hooks.items() for name in names]  # fmt: skip
    return "\n\n".join([
        "# Hooks", HEAD,
        f"What a backend plugin answers: hook specification {hookspecs.VERSION}, "
        "`polyquant.contract.hookspecs.QuantBackend`. "
        "A walk through: [for authors](../authors/index.md).",
        markdown(("hook", "kind", "answers"), rows),
        "::: polyquant.contract.hookspecs.QuantBackend\n    options:\n      show_root_full_path: false",
    ]) + "\n"  # fmt: skip


def first_sentence(thing: Any) -> str:
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


def command_line_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    root = typer.main.get_command(build(None))
    parts = [
        "# Command line",
        HEAD,
        "Every command has `--help`; with `--backend NAME` it shows that backend's options too, which are on the "
        "[backends' pages](../backends/index.md). `polyquant --install-completion` completes commands, options, "
        "backends and candidates. Exit codes: 0 fine, 1 the check or the work failed, 2 wrong use, 130 interrupted.",
    ]
    shared = {option.opts[0]: option for option in root.commands["load"].params
              if getattr(option, "rich_help_panel", None) == "How to load"}  # fmt: skip
    for name, command in root.commands.items():
        text = inspect.cleandoc(command.help or "")
        body, _, example = text.partition("Example: ")
        loads = {each.opts[0] for each in command.params} >= set(shared)
        own = [each for each in command.params if each.name != "help" and not (loads and each.opts[0] in shared)]
        parts += [f"## polyquant {name}", body.strip()]
        parts += [f"```text\n{example.strip()}\n```"] if example else []
        parts += (
            [markdown(("argument or option", "value", "default", "meaning"), [row(each) for each in own])]
            if own
            else []
        )
        parts += ["And the options of [how to load](#how-to-load)."] if loads else []
    parts += ["## How to load", "Options of every command that loads a model.",
              markdown(("option", "value", "default", "meaning"), [row(each) for each in shared.values()])]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def row(parameter: Any) -> tuple[str, ...]:
    """A parameter of a command."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`", "", "" if parameter.required else "none", escaped(parameter.help or "")
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    kind = "" if parameter.is_flag else f"`{parameter.metavar or parameter.type.name}`"
    default = (
        "required" if parameter.required else "" if parameter.default in (None, "", False, ()) else parameter.default
    )
    text, found, rest = (parameter.help or "").partition(" (default: ")
    return names, escaped(kind), str(rest.removesuffix(")") if found else default), escaped(text)


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def records_page() -> str:
    """The public records, each field with the comment or the description beside it."""
    parts = ["# Records", HEAD, "Frozen, typed, JSON through `to_json()`; units are in the names. They gain fields "
             "with defaults; one goes only after a release in which it warns."]  # fmt: skip
    for module_name, about in RECORDS.items():
        module = importlib.import_module(module_name)
        parts += [f"## {module_name}", about]
        for name, record in vars(module).items():
            if inspect.isclass(record) and issubclass(record, msgspec.Struct) and record.__module__ == module_name and (
                record.__struct_fields__ and not name.startswith("_")
            ):  # fmt: skip
                text = (inspect.getdoc(record) or "").partition("\n\n")[0]
                parts += [
                    f"### {name}",
                    " ".join(text.split()),
                    markdown(("field", "type", "meaning"), list(fields(record))),
                ]
    return "\n\n".join(parts) + "\n"


def fields(record: type[msgspec.Struct]) -> Iterator[tuple[str, ...]]:
    """The fields that the class itself adds, then its properties."""
    source = inspect.getsource(record)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens
                if token.type == tokenize.COMMENT}  # fmt: skip
    described = {option.name: option for option in describe_options(record)}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in described:
            option = described[node.target.id]
            kind = allowed(option) if option.description else f"`{ast.unparse(node.annotation)}`"
            yield (
                f"`{option.name}`",
                escaped(kind),
                escaped(option.description or comments.get(node.end_lineno or 0, "")),
            )
        elif isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "property" for each in node.decorator_list):
            kind = f"`{ast.unparse(node.returns)}`" if node.returns else ""
            yield f"`{node.name}`", escaped(kind), escaped(" ".join((ast.get_docstring(node) or "").split()))

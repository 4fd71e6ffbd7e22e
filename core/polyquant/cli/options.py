"""Command-line options made from typed options: how to load, and the backend's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import typer

from polyquant.cli.arguments import Loading, complete_backend
from polyquant.errors import ConfigError, PolyquantError
from polyquant.options import Option, convert, describe_options
from polyquant.registry.written import typed, words_of
from polyquant.types import BackendInfo

LOADING = "How to load"


def _shared() -> list[inspect.Parameter]:
    def option(name: str, kind: Any, default: Any, help: str, *flags: str, **more: Any) -> inspect.Parameter:
        info = typer.Option(*(flags or (f"--{name.replace('_', '-')}",)), help=help, rich_help_panel=LOADING, **more)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )

    return [
        option("backend", str | None, None, "Quantization backend, or backend:preset; a checkpoint names its own.",
               "--backend", "-b", autocompletion=complete_backend),
        option("device", str, "auto", "cpu, cuda, cuda:1, xpu, mps; auto: the fastest that the backend supports."),
        option("max_memory", str | None, None, "Room on each device, as in '0=6GiB,cpu=24GiB'."),
        option("offload", str, "error", "Where the model does not fit the device: error, cpu, disk (packed, on CPUs)."),
        option("attention", str, "", "Attention implementation: eager, sdpa, flash_attention_2."),
        option("kv_cache", Literal["keep", "int8", "int4"], "keep",
               "Keys and values between tokens: as they are, or the older ones as codes: less memory, less exact."),
        option("emulate_activations", bool, False,
               "Round activations as the format's kernels do (W4A4, W8A8): their quality, where they are not here.",
               "--emulate-activations"),
        option("adapter", list[str], [], "LoRA adapter to put on the model, a folder or hub name; several are added."),
        option("revision", str | None, None, "Branch, tag or commit of a hub repository."),
        option("allow_dequantize", bool, False, "Accept a model that ends up dense.", "--allow-dequantize"),
        option("allow_pickle", bool, False, "Read pickle weights, which can run any code.", "--allow-pickle"),
        option("cache", bool, True, "Keep quantized weights for the next load of the same, and take them from there.",
               "--cache/--no-cache"),
        option("trust_remote_code", bool, False, "Run the repository's own Python code.", "--trust-remote-code"),
    ]  # fmt: skip


def _own(option: Option, panel: str) -> inspect.Parameter:
    flag = option.flag
    default = ",".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
    default = f" (default: {default})" if default not in (None, "") and option.kind != "true/false" else ""
    if option.kind == "true/false":
        info = typer.Option(
            f"{flag}/--no-{flag[2:]}", help=option.description, rich_help_panel=panel, show_default=False
        )
        annotation: Any = Annotated[bool | None, info]
    elif option.kind == "table":
        formats = f"; FORMAT: {', '.join(map(str, option.values))}; repeat it, the last that matches is taken"
        info = typer.Option(
            flag, help=option.description + formats, rich_help_panel=panel, metavar="PATTERN=FORMAT",
            show_default=False,
        )  # fmt: skip
        annotation = Annotated[list[str] | None, info]
    else:
        values = [str(value) for value in option.values]
        info = typer.Option(
            flag,
            help=option.description + default,
            rich_help_panel=panel,
            metavar="|".join(values) or option.kind.upper(),
            autocompletion=lambda incomplete: [value for value in values if value.startswith(incomplete)],
        )
        annotation = Annotated[str | None, info]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def spread(command: Callable[..., Any], parameter: str, options_type: type[msgspec.Struct], panel: str) -> Any:
    """`command` with its `parameter`, a dictionary, spread into the options of `options_type`; it gets those given."""
    signature = inspect.signature(command, eval_str=True).parameters
    own = [_own(option, panel) for option in describe_options(options_type)]

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        given = {each.name: values.pop(each.name) for each in own}
        typed = typed_text(options_type, {name: value for name, value in given.items() if value not in (None, [])})
        return command(**values, **{parameter: typed})

    return _signed(run, [each for name, each in signature.items() if name != parameter] + own)


def loads_models(command: Callable[..., Any], backend: str | None, *, chooses: bool = False) -> Callable[..., Any]:
    """`command` with its `loading` parameter spread into options: how to load, and those of `backend`.

    chooses: the command chooses the formats itself, and takes no options that do.
    """
    info, signature = usable_card(backend), inspect.signature(command, eval_str=True).parameters
    plain = [parameter for name, parameter in signature.items() if name != "loading"]
    shared = [parameter for parameter in _shared() if parameter.name not in signature]
    described = [*describe_options(info.options), *_query_words(info)] if info else []
    left_out = (*getattr(info.options, "format_options", ()), *words_of(info)) if info and chooses else ()
    own = (
        [_own(option, f"Options of {info.name}") for option in described if option.name not in left_out] if info else []
    )

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        given = {parameter.name: values.pop(parameter.name) for parameter in own}
        how = {parameter.name: values.pop(parameter.name) for parameter in shared}
        chosen, revision = how.pop("backend"), how.pop("revision")
        how["max_memory"] = _max_memory(how["max_memory"])
        text = {name: value for name, value in given.items() if value not in (None, [])}
        options = typed(info, text, strict=False) if info else {}
        return command(**values, loading=Loading(chosen, revision, {**how, **options}))

    return _signed(run, plain + shared + own)


def _signed(run: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """`run` with a signature of these parameters, for typer to read."""
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    if hasattr(run, "__wrapped__"):
        del run.__wrapped__
    return run


def usable_card(backend: str | None) -> BackendInfo | None:
    """The card of a usable backend, also of `backend:preset`; a wrong name is told when the command runs."""
    if backend is None:
        return None
    from polyquant.registry.installed import registry

    try:
        info = registry().info(backend.partition(":")[0])
        _ = info.options  # where the card is a file's, this imports the plugin
    except PolyquantError:
        return None
    return info


def _query_words(info: BackendInfo) -> list[Option]:
    """The words of a query, which stand for options of the backend's own."""
    can = info.capabilities
    values: dict[str, tuple[object, ...]] = {"bits": tuple(f"{bits:g}" for bits in can.bits), "scheme": can.schemes}
    return [
        Option(word, None, values[word], "text", f"what has this {word}, whatever option says so")
        for word in words_of(info)
    ]


def typed_text(options_type: type[msgspec.Struct], text: dict[str, object]) -> dict[str, object]:
    """Values of some options of a record, of text or already typed. Raises ConfigError for what is not allowed."""
    found = convert(options_type, text, strict=False)
    return {name: getattr(found, name) for name in text}


def switches_of(text: str | None) -> dict[str, Any]:
    """Switches of a chat template: values are JSON's where they are JSON, as in enable_thinking=false, else text.

    Raises ConfigError for a word without =.
    """
    switches: dict[str, Any] = {}
    for part in (text or "").split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if text and not (name and equals):
            raise ConfigError(f"--template must look like 'enable_thinking=false,level=2', got {text!r}")
        if name:
            try:
                switches[name] = msgspec.json.decode(value)
            except msgspec.DecodeError:
                switches[name] = value
    return switches


def _max_memory(text: str | None) -> dict[int | str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not device or not size for device, _, size in pairs):
        raise ConfigError(f"--max-memory must look like '0=6GiB,cpu=24GiB', got {text!r}")
    return {int(device) if device.strip().isdigit() else device.strip(): size.strip() for device, _, size in pairs}

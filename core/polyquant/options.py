"""Typed backend options: the base record, strict conversion, and errors that name the allowed values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from polyquant.errors import ConfigError, did_you_mean
from polyquant.modules import matching_modules, module_of

if TYPE_CHECKING:
    from polyquant.activations import Activations
    from polyquant.types import HeldWeight, WeightInfo

Dtype = Literal["float32", "bfloat16", "float16"]
RoundingMethod = Literal["nearest", "fitted", "calibrated", "tuned", "codebook"]
"""How weights become codes. nearest: each is rounded, nothing else is looked at. fitted: scales or zero points are
fitted to the weights. calibrated: with sample text (GPTQ, AWQ). tuned: the rounding is learned on sample text
(AutoRound). codebook: groups of weights are entries of learned code books (AQLM)."""
NumberFormat = Literal["integers", "integers with zero points", "normal floats", "floats", "k-quants", "vectors"]
"""What codes stand for. integers: even steps around zero. integers with zero points: even steps from a minimum of their
own. normal floats: a table of uneven levels (NF4, IQ4_NL). floats: FP8, FP4, MXFP4. k-quants: even steps whose scales
and minima are quantized again (Q4_K). vectors: several weights at once (AQLM, IQ2)."""


class BackendOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options every backend has. A backend subclasses this with its own, each described by `msgspec.Meta`.

    Checks across fields go into `__post_init__` and raise ValueError.
    """

    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="dtype of activations and dense weights; auto: the backend's measured choice for the device"),
    ] = "auto"
    skip: Annotated[
        tuple[str, ...],
        Meta(
            description="more modules to keep dense: name parts, * matches any run, as in 'layers.0' or '*.down_proj'"
        ),
    ] = ()
    skip_defaults: Annotated[
        bool, Meta(description="keep the backend's default dense modules (the output head) dense too")
    ] = True

    takes_experts: ClassVar[bool] = False
    """Whether the hook `write_unpacked` takes fused experts: under their tensor's name, what `unpack` gave of each
    stacked along a new first axis."""
    load_time: ClassVar[frozenset[str]] = frozenset({"compute_dtype"})
    """Options that apply to a checkpoint that is quantized already; all others are stored in it."""

    def with_full_names(self, weights: Sequence[WeightInfo]) -> Self:
        """`skip` as full module names; defaults, tied modules and those that run dense only included.

        `skip_defaults` is then spent. Unchanged where nothing but libraries' own defaults stays dense: they know no
        towers, and no modules with code of their own. Raises ConfigError for a pattern that matches nothing.
        """
        never = [module_of(weight) for weight in weights if weight.role in ("tower", "custom")]
        if not self.skip and self.skip_defaults and not never:
            return self
        asked = matching_modules(weights, self.skip)
        modules = {module_of(weight): weight for weight in weights if weight.role != "vector"}
        tied = {weight.tied_to for weight in weights}
        always = [name for name, weight in modules.items() if weight.tied_to or weight.name in tied]
        defaults = [name for name, weight in modules.items() if self.skip_defaults and weight.default_skip]
        skip = tuple(dict.fromkeys([*asked, *defaults, *always, *never]))
        return msgspec.structs.replace(self, skip=skip, skip_defaults=False)

    def skips(self, weight: WeightInfo) -> bool:
        """Whether the tensor's module stays dense on request, by default, or because it is tied to another."""
        by_default = self.skip_defaults and not self.skip and weight.default_skip
        return module_of(weight) in self.skip or by_default or bool(weight.tied_to)

    @property
    def stored_skip(self) -> list[str] | None:
        """`skip` as most checkpoints store it; None where nothing but the backend's defaults stays dense."""
        return None if self.skip_defaults and not self.skip else list(self.skip)

    @property
    def rounding_method(self) -> RoundingMethod:
        """How weights become codes with these options."""
        return "nearest"

    @property
    def number_format(self) -> NumberFormat:
        """What the codes stand for with these options."""
        return "integers"

    @property
    def weight_bits(self) -> float:
        """Nominal bits of a quantized weight."""
        raise NotImplementedError

    @property
    def level_bits(self) -> float:
        """Bits that decide how exact a weight is: below `weight_bits` where few levels are kept in wide numbers."""
        return self.weight_bits

    @property
    def rounds_activations(self) -> bool:
        """Whether the format asks for activations in few bits too: it is then more than its weights."""
        return False

    def activations_of(self, weight: WeightInfo) -> Activations | None:
        """What kernels that round activations too do to the inputs of a layer in this format; None: there are none.

        For layers that are `PackedLinear`: a load with `emulate_activations` computes it.
        """
        return None

    @property
    def scheme(self) -> str:
        """Which of the card's schemes these options are; empty: the one that an option's value names, or a file."""
        return ""

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint with these options; `from_stored` reads it back."""
        raise NotImplementedError

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """The options that a checkpoint's `quantization_config` stands for.

        Raises ValueError where a value is one the backend cannot read.
        """
        raise NotImplementedError

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """The options of a checkpoint that holds these weights as they are: what `polyquant convert` writes.

        For backends with the hook `unpack`. Asked with each weight alone too, so that all with no place are named.
        Only what says how weights are stored: bits, group size, zero points, act-order.
        Raises Misfit, which names the property, where there are none.
        """
        raise NotImplementedError


Options = TypeVar("Options", bound=msgspec.Struct)


class Option(msgspec.Struct, frozen=True):
    """One option as the command line and the docs show it."""

    name: str
    default: object
    values: tuple[object, ...]  # the allowed values; empty where any value of `kind` goes
    kind: str  # integer, number, text, true/false, list, table
    description: str

    @property
    def flag(self) -> str:
        """Its name on the command line. A table is given entry by entry: --layer PATTERN=FORMAT, of `layers`."""
        name = self.name.removesuffix("s") if self.kind == "table" else self.name
        return f"--{name.replace('_', '-')}"


@cache
def describe_options(options_type: type[msgspec.Struct]) -> tuple[Option, ...]:
    """Every option with its default, allowed values and description, own options first."""
    common = {field.name for field in msgspec.structs.fields(BackendOptions)}
    described = [_describe(field) for field in msgspec.structs.fields(options_type)]
    return tuple(sorted(described, key=lambda option: option.name in common))


def _describe(field: msgspec.structs.FieldInfo) -> Option:
    description, hint = "", field.type
    if get_origin(hint) is Annotated:
        hint, *extra = get_args(hint)
        description = next((meta.description or "" for meta in extra if isinstance(meta, Meta)), "")
    values: list[object] = []
    kinds: set[str] = set()
    names = {int: "integer", float: "number", str: "text", bool: "true/false", tuple: "list"}
    for part in _alternatives(hint):
        if get_origin(part) is Literal:
            values += get_args(part)
        elif is_pairs(part):
            kinds.add("table")
            values += get_args(get_args(get_args(part)[0])[1])
        elif part is not type(None):
            kinds.add(names.get(get_origin(part) or part, "text"))
    if bool in {type(value) for value in values} or kinds == {"true/false"}:
        values = []
    return Option(field.name, field.default, tuple(values), " or ".join(sorted(kinds)), description)


def is_pairs(hint: Any) -> bool:
    """Whether a type is that of pairs, as `LayerFormats` is."""
    return get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is tuple


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; a Literal counts as one."""
    return (
        get_args(hint)
        if get_origin(hint) is not Literal and get_origin(hint) is not tuple and get_args(hint)
        else (hint,)
    )


def convert(options_type: type[Options], options: Mapping[str, object], *, strict: bool = True) -> Options:
    """`options` as a record of `options_type`.

    strict=False reads text, as the command line and candidate files give it: '4', 'true', 'a,b'.
    Raises ConfigError for an unknown option or a value that is not allowed.
    """
    known = {option.name: option for option in describe_options(options_type)}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")
    values: dict[str, object] = dict(options)
    for name, value in values.items():
        if known[name].kind == "list" and isinstance(value, str):
            values[name] = tuple(part.strip() for part in value.split(",") if part.strip())
        elif known[name].kind == "table":
            values[name] = pairs_of(value)
    try:
        return msgspec.convert(values, options_type, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(error, values, known)) from error


def pairs_of(value: Any) -> Any:
    """Pairs of a dictionary, or of texts `pattern=format`, between which there are commas or semicolons.

    Anything else as it is, to be refused by its type.
    """
    if isinstance(value, Mapping):
        return tuple(value.items())
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)):
        return value
    found: list[object] = []
    for entry in entries:
        texts = [text for text in re.split("[,;]", entry) if text.strip()] if isinstance(entry, str) else None
        found += [entry] if texts is None else [tuple(map(str.strip, text.rpartition("=")[::2])) for text in texts]
    return tuple(found)


def _explain(error: msgspec.ValidationError, values: Mapping[str, object], known: Mapping[str, Option]) -> str:
    message, _, path = str(error).partition(" - at `$.")
    name = path.rstrip("`").partition("[")[0]
    if name not in known:
        return str(error)
    option, got = known[name], values.get(name)
    if option.values:
        allowed = " or ".join([", ".join(map(repr, option.values[:-1])), repr(option.values[-1])]).removeprefix(" or ")
        texts = [str(value) for value in option.values if isinstance(value, str)]
        if option.kind == "table":
            wrong = _wrong_pair(got, texts)
            given = f"{wrong[0]}={wrong[1]}" if wrong else repr(got)
            hint = did_you_mean(wrong[1], texts) if wrong else ""
            return f"{name}: a format is {allowed}, as in {option.flag} PATTERN=FORMAT; got {given}.{hint}"
        hint = did_you_mean(str(got), texts)
        return f"{name} must be {allowed}, got {got!r}.{hint}"
    return f"{name} must be {option.kind}, got {got!r} ({message})."


def _wrong_pair(pairs: object, formats: Sequence[str]) -> tuple[str, str] | None:
    """The first pair of texts whose second is no format."""
    for pair in pairs if isinstance(pairs, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and pair[1] not in formats:
            return str(pair[0]), str(pair[1])
    return None


def resolved_dtype(options: BackendOptions) -> Dtype:
    """The compute dtype the core has settled on. Raises ConfigError where it is still 'auto'."""
    if options.compute_dtype == "auto":
        raise ConfigError(
            "compute_dtype is still 'auto': load through polyquant.load, which resolves it for the device"
        )
    return options.compute_dtype

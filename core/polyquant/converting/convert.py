"""A quantized checkpoint in another format: read, re-labelled layer by layer, written, read back and compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polyquant.converting.records import Conversion
from polyquant.errors import ConversionRefused, Misfit, UnsupportedOperation
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.modules import module_of
from polyquant.options import BackendOptions
from polyquant.registry.backend import Backend
from polyquant.support.files import atomic_folder
from polyquant.support.outputs import require_free
from polyquant.types import HeldWeight

if TYPE_CHECKING:
    from polyquant.converting.source import Source

SHOWN = 3  # layers of a refusal


def convert(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
    requantize: bool = False,
    max_kl: float = 0.05,
    calibration: Sequence[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> Conversion:
    """Write a quantized checkpoint in another format, into the folder `out`, all or nothing: nothing is rounded again.

    model: a quantized checkpoint, as `load` takes it. to: a backend whose format it gets, `gptq` or, with options that
        are else inferred from the weights, `gptq:group_size=64`. backend: that reads `model`; None: it names its own.
    requantize: where the format has no place for the weights as they are, quantize the dequantized model; refused where
        the mean KL to the source is above max_kl, in nats. calibration: texts for backends that calibrate.
    options: what `load` takes: revision, trust_remote_code, allow_pickle.
    What is written is read back by the target's own reader; each layer's largest difference is in the result.
    Raises ConversionRefused, with the properties and layers, where the format has no place for them.

    >>> polyquant.convert("model-gptq", "compressed-tensors", "model-vllm").exact
    """
    out = Path(out)
    name, given = handles.written(to, {})
    target = target_named(name)
    target.config(given)  # refused before a file is read
    require_free(out, overwrite=overwrite, keeps=(Path(model),))
    target.require("cpu")
    from polyquant.converting import source as reading  # torch, which refusals above do without

    source = reading.read(model, backend, {**options, "progress": progress})
    if source.loaded.backend.name == target.name and not given:
        raise ConversionRefused(f"{model} is {target.name}'s already: there is nothing to convert; give options (--to)")
    try:
        with atomic_folder(out, overwrite=overwrite, keeps=source.loaded.files) as partial:
            made = converted(source, target, given, partial, progress=progress, trusts=_trusts(options))
        return msgspec.structs.replace(made, source=str(model), out=str(out))
    except ConversionRefused as refused:
        if not requantize:
            raise
        from polyquant.converting.requantize import requantized

        return requantized(source, target, given, out, max_kl, calibration, refused, overwrite=overwrite)


def converted(
    source: Source, target: Backend, given: Mapping[str, object], out: Path, *, progress: bool, trusts: dict[str, Any]
) -> Conversion:
    """Write the source in the target's format, and read it back. Raises ConversionRefused."""
    import torch
    from tqdm import tqdm

    from polyquant.converting.compare import compared
    from polyquant.converting.source import narrow
    from polyquant.packed_weights.codes import codes_of
    from polyquant.plugin import unpacked

    loaded, misfits = source.loaded, _Misfits(target, source.loaded.backend.name)
    assert loaded.request is not None
    assert loaded.settled is not None
    for name, layer in source.left.items():
        misfits.add(name, Misfit("bits", f"{layer.scheme} has no place in polyquant's packed layout"))
    if not target.info.options.takes_experts:
        for name in source.stacks:
            misfits.add(name, Misfit("experts", "it holds the experts of a layer, which this format is not given"))
    found: dict[str, HeldWeight] = {}
    for name, weight in source.weights():
        with misfits.of(name):
            own = codes_of(name, weight).held
            found[name] = _place_for_both(found[name], own) if name in found else own
    misfits.refuse()
    held = list(found.values())
    config = msgspec.structs.replace(_options(target, held, given, misfits), skip=_dense(source), skip_defaults=False)

    def layers() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, module in tqdm(source.layers.items(), desc="Converting", unit="layer", disable=not progress):
            with misfits.of(name):
                yield name, target.unpack(codes_of(name, module.packed), config)
        for name, stack in tqdm(source.stacks.items(), desc="Converting", unit="stack", disable=not progress):
            with misfits.of(name):
                each = [target.unpack(codes_of(name, weight), config) for weight in stack.packed]
                yield name, {part: torch.stack([tensors[part] for tensors in each]) for part in each[0]}
        misfits.refuse(held)

    plain = msgspec.structs.replace(loaded.request, source=msgspec.structs.replace(loaded.request.source, gguf_file=""))
    written = LoadedModel(
        model=loaded.model, tokenizer=loaded.tokenizer, config=config, kernel="", request=plain, _backend=target
    )
    with narrow(loaded), source.kept():
        if target.can("write_unpacked"):
            target.write_unpacked(written, layers(), out)
        else:
            unpacked.write(written, layers(), out)
    rows = compared(source, out, target, trusts, progress=progress)
    return Conversion(
        source=loaded.request.source.name, source_backend=loaded.backend.name, target_backend=target.name,
        options=_shown(config), out=str(out), layers=tuple(rows), notes=(*source.notes, *written.notes),
        checkpoint_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    )  # fmt: skip


def _place_for_both(one: HeldWeight, other: HeldWeight) -> HeldWeight:
    """What a place for two experts of a stack has to have."""
    points = max(one.zero_points, other.zero_points, key=("middle", "whole", "none").index)
    return msgspec.structs.replace(one, zero_points=points, ordered=one.ordered or other.ordered)


def _dense(source: Source) -> tuple[str, ...]:
    """Modules that stay dense, which readers know by name."""
    assert source.loaded.settled is not None
    taken = {*source.layers, *(name.rpartition(".")[0] for name in source.stacks)}
    matrices = (each for each in source.loaded.settled.weights if each.role in ("linear", "head", "experts"))
    return tuple(name for name in dict.fromkeys(map(module_of, matrices)) if name not in taken)


def _options(
    target: Backend, held: Sequence[HeldWeight], given: Mapping[str, object], misfits: _Misfits
) -> BackendOptions:
    """The target's options that hold the weights, with those given. Raises ConversionRefused."""
    holding = target.info.options.holding
    for weight in held:
        with misfits.of(weight.name):
            holding([weight])
    misfits.refuse(held)
    with misfits.of("layers together"):
        inferred = holding(held)
    misfits.refuse(held)
    if any(name in given for name in getattr(target.info.options, "format_options", ())):
        inferred.pop("layers", None)
    return target.config({**inferred, **given})


class _Misfits:
    """What a format has no place for, layer by layer."""

    def __init__(self, target: Backend, source: str) -> None:
        """source: the backend that reads the checkpoint."""
        self.target, self.source = target, source
        self.found: dict[str, list[tuple[str, Misfit]]] = defaultdict(list)  # property -> layers

    def add(self, layer: str, misfit: Misfit) -> None:
        self.found[misfit.trait].append((layer, misfit))

    @contextmanager
    def of(self, layer: str) -> Iterator[None]:
        """In the block, a misfit is the layer's."""
        try:
            yield
        except Misfit as misfit:
            self.add(layer, misfit)

    def refuse(self, held: Sequence[HeldWeight] = ()) -> None:
        """Raises ConversionRefused where there are any, with the other formats that hold all weights."""
        if not self.found:
            return
        said = []
        for trait, layers in self.found.items():
            names = ", ".join(name for name, _ in layers[:SHOWN]) + (", ..." if len(layers) > SHOWN else "")
            said.append(f"{trait} of {len(layers)} layers ({names}): {layers[0][1].what}")
        others = [
            name for name in _targets() if name not in (self.target.name, self.source) and held and _holds(name, held)
        ]
        ways = [f"convert to {' or '.join(others)}"] if others else []
        ways.append("round the weights again, if that stays close enough (--requantize --max-kl 0.05)")
        raise ConversionRefused(
            f"{self.target.name} has no place for these weights as they are: {'; '.join(said)}. Nothing was written: "
            f"{', or '.join(ways)}"
        )


def _targets() -> list[str]:
    """Backends that something is converted to, in this environment."""
    names = handles.backends().names
    return [
        name
        for name in names
        if handles.backend(name).can("unpack") and not handles.environment_name(handles.backend(name))
    ]


def _holds(name: str, held: Sequence[HeldWeight]) -> bool:
    try:
        handles.backend(name).info.options.holding(held)
    except Misfit:
        return False
    return True


def _shown(config: BackendOptions) -> dict[str, Any]:
    """Options that say how weights are stored, but for their defaults."""
    apart = {*type(config).load_time, "skip", "skip_defaults"}
    fields = msgspec.structs.fields(type(config))
    return {field.name: getattr(config, field.name) for field in fields
            if field.name not in apart and getattr(config, field.name) not in (None, (), "")}  # fmt: skip


def _trusts(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("trust_remote_code",) if name in options}


def target_named(name: str) -> Backend:
    """The backend of a format that layers are converted to. Raises UnsupportedOperation for others."""
    target = handles.backend(name)
    if not target.can("unpack") or handles.environment_name(target):
        where = "it runs in an environment of its own" if handles.environment_name(target) else "it has no hook for it"
        raise UnsupportedOperation(f"nothing is converted to {name}: {where}; to {', '.join(_targets())} it is")
    return target

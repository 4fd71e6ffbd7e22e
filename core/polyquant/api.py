"""The public functions: list, query, check, load, verify, quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polyquant.errors import BackendFailed, BrokenBackend, ConfigError, SaveError, UnsupportedOperation
from polyquant.isolated.environments import as_seen_here
from polyquant.isolated.remote import RemoteModel, backend_named, home
from polyquant.registry.backend import Backend
from polyquant.registry.query import Miss, Selection, select
from polyquant.registry.registry import Registry
from polyquant.types import Problem, Record

if TYPE_CHECKING:
    from polyquant.finetuning.merge_methods import Way
    from polyquant.finetuning.options import Step, Tuned
    from polyquant.loaded import LoadedModel
    from polyquant.loading.records import Verification
    from polyquant.measure.quality.records import Quality


class Diagnosis(Record, frozen=True):
    """What `doctor` found for one backend on one device."""

    backend: str
    origin: str  # the distribution that provides it
    device: str
    problems: list[Problem]
    environment: str = ""  # the name of its own, where it runs in one

    @property
    def runs(self) -> bool:
        """Whether nothing stops it."""
        return not self.problems


@cache
def registry() -> Registry:
    """The backends of this process; entry points are read once."""
    return Registry()


def backends(**query: object) -> Selection:
    """Installed backends, filtered by capabilities; imports neither torch nor any backend's library.

    >>> polyquant.backends(bits=4, device="cpu", on_the_fly=True).names

    `misses` of the result holds the others, nearest first, with why each misses.
    """
    cards, broken = [], []
    for name in registry().names():
        try:
            cards.append(as_seen_here(registry().info(name)))
        except BrokenBackend as error:
            broken.append(Miss(name=name, reasons=(str(error),), broken=True))
    return select(cards, query, broken)


def backend(name: str) -> Backend:
    """One backend by name. Raises UnknownBackend or BrokenBackend."""
    return backend_named(name, registry())


def doctor(name: str | None = None, *, device: str = "auto") -> list[Diagnosis]:
    """Whether each installed backend, or one, can run here; every problem with the command that fixes it."""
    from polyquant.support.environment import choose_device

    diagnoses = []
    for each in [name] if name else registry().names():
        try:
            handle = backend(each)
            chosen = choose_device(device, handle.capabilities)
            problems, where = handle.problems(chosen), home(handle)
            diagnoses.append(
                Diagnosis(backend=each, origin=handle.origin, device=chosen, problems=problems, environment=where)
            )
        except (BrokenBackend, BackendFailed) as error:
            fix = f"update or uninstall {registry().origin(each)}, or set POLYQUANT_DISABLE={each}"
            broken = Problem(what=str(error), fix=fix, kind="import", detail=str(error.__cause__ or ""))
            diagnoses.append(Diagnosis(backend=each, origin=registry().origin(each), device=device, problems=[broken]))
    return diagnoses


def load(model: str | Path, backend: str | None = None, *, revision: str | None = None, **options: Any) -> LoadedModel:
    """Load a model quantized.

    model: hub name, local folder, `.gguf` file, or `builtin:smollm2`.
    backend: a name; None for a checkpoint that is quantized already, whose backend is then found.
    options: the backend's own (`polyquant.backend(name).info.options`), and how to load (LoadOptions): `device`,
        `device_map`, `max_memory`, `offload`, `allow_dequantize`, `trust_remote_code`, `allow_pickle`, `attention`,
        `adapter` (a folder of PEFT's to put on the model).

    >>> loaded = polyquant.load("builtin:smollm2", backend="bitsandbytes", bits=4, quant_type="nf4")
    >>> loaded.generate("The capital of France is", max_new_tokens=8)
    """
    from polyquant.loading import load as loading
    from polyquant.loading import stored
    from polyquant.models.resolve import resolve

    how, own = _split(options)
    handle = registry_backend(backend) if backend else None
    config = handle.config(own) if handle else None
    source = resolve(
        model, revision=revision, allow_pickle=how.allow_pickle, progress=how.progress,
        as_gguf=handle is not None and handle.capabilities.only_gguf,
    )  # fmt: skip
    if handle is None:
        method = stored.method_of(source)
        if not method:
            known = ", ".join(registry().names()) or "none"
            raise ConfigError(
                f"{source.name} is dense: name the backend to quantize it with (backend=...); installed: {known}"
            )
        handle = registry_backend(stored.reader_of(method, backends()))
        config = handle.config(own)
    assert config is not None  # either branch above has set it
    return loading.load(source, handle, config, own, how)


def verify(loaded: LoadedModel, **arguments: Any) -> Verification:
    """Prove what a load gave; see `polyquant.loading.verify.verify`."""
    from polyquant.loading import verify as verification

    if isinstance(loaded, RemoteModel):
        return loaded.verify(**arguments)
    return verification.verify(loaded, **arguments)


def quantize(
    model: str | Path,
    backend: str,
    out: str | Path,
    *,
    calibration: Sequence[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a quantized checkpoint of `model` into the folder `out`, all or nothing.

    A backend that quantizes offline gets the texts of `calibration`, and what it wrote is loaded back and verified
    before it takes its place; any other loads, verifies and saves.
    Raises UnsupportedOperation, before any work, where the backend cannot write one, and SaveError where the result
    does not pass.
    """
    from polyquant.loading import load as loading
    from polyquant.models.resolve import resolve

    handle, out = registry_backend(backend), Path(out)
    if out.exists() and not overwrite:
        raise SaveError(f"{out} exists; choose another folder, or replace it with overwrite=True (--overwrite)")
    if handle.can("quantize"):
        how, own = _split(options)
        config = handle.config(own)
        source = resolve(
            model, allow_pickle=how.allow_pickle, progress=how.progress, as_gguf=handle.capabilities.only_gguf
        )
        request, effective, _ = loading.prepare(source, handle, config, own, how, to_quantize=True)

        def accept(written: Path) -> None:
            again = {"device": request.device, "trust_remote_code": how.trust_remote_code, "progress": how.progress}
            _require_passed(load(written, backend, **again))

        return handle.quantize(request, effective, calibration or (), out, overwrite=overwrite, accept=accept)
    if not handle.can("save"):
        raise UnsupportedOperation(f"{backend} cannot write checkpoints")
    if calibration is not None:
        raise ConfigError(f"{backend} quantizes without calibration text; leave calibration (--calibration) out")
    loaded = load(model, backend, **options)
    _require_passed(loaded)
    return loaded.save(out, overwrite=overwrite)


def _require_passed(loaded: LoadedModel) -> None:
    """Raises SaveError where a model that is to be written fails its verification."""
    report = verify(loaded)
    if not report.passed:
        failed = "; ".join(f"{check.name}: expected {check.expected}, found {check.found}" for check in report.failures)
        raise SaveError(f"not written, because verification failed: {failed}")


def finetune(
    model: LoadedModel | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    report: Callable[[Step], None] | None = None,
    **options: Any,
) -> Tuned:
    """Train LoRA adapters on a quantized base, which stays frozen, and write them to the folder `out`.

    model: one that is loaded (it carries the adapter afterwards), or what `load` takes.
    data: JSONL (`text`, `prompt` with `completion`, or `messages`), a text file, or a name for `datasets`.
    report: called with each `Step`. restart: forget an unfinished run; without, the same call goes on with it.
    options: of training (`polyquant.finetuning.options.TrainingOptions`); the others are `load`'s.

    >>> polyquant.finetune("builtin:smollm2", "train.jsonl", "adapter", backend="bitsandbytes", bits=4, steps=30)
    """
    from polyquant.finetuning.options import TrainingOptions
    from polyquant.finetuning.run import finetune as run
    from polyquant.options import convert

    training = {name: options.pop(name) for name in TrainingOptions.__struct_fields__ if name in options}
    chosen = convert(TrainingOptions, training)
    if isinstance(model, (str, Path)):
        if backend is not None and not registry_backend(backend).capabilities.trains:
            raise UnsupportedOperation(
                f"{backend} cannot train adapters; installed backends that do: {', '.join(backends(trains=True).names)}"
            )
        model = load(model, backend, **options)
    elif options or backend is not None:
        raise ConfigError(f"the model is loaded already: leave out {', '.join(options) or 'backend'}")
    return run(model, data, Path(out), chosen, overwrite=overwrite, restart=restart, report=report)


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    way: Way,
    *,
    backend: str | None = None,
    threshold: float = 0.1,
    force: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Quality:
    """Merge an adapter into `model` and write the result to `out`, if it stays close to base and adapter.

    way: `dense` (into the dense model), `dequantize` (into the dequantized base) or `requantize` (into the dense model,
        quantized again); `polyquant.finetuning.merge_methods` says what each loses.
    backend, options: of the base, as `load` takes them; where left out, those on the adapter's card.
    threshold: largest mean KL(base and adapter || merged) in nats; above, MergeRefused unless `force`.
    Returns the comparison, on the text that comes with polyquant.
    """
    from polyquant.finetuning.merge import merge as run

    return run(
        model, Path(adapter), Path(out), way, backend, options, threshold, force=force, overwrite=overwrite, load=load,
        quantize=quantize,
    )  # fmt: skip


@contextmanager
def observing(observer: object) -> Iterator[None]:
    """Within the block, `observer` sees every addressed hook call: its methods are `hookimpl(wrapper=True)` hooks.

    `polyquant.registry.observers.Recorder`, which records time and peak memory, is one.
    """
    registry().add_observer(observer)
    try:
        yield
    finally:
        registry().remove_observer(observer)


registry_backend = backend  # the function, where a parameter is called `backend` too


def _split(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """How to load, and the backend's own options."""
    from polyquant.loading.load import LoadOptions

    shared = {name: options[name] for name in LoadOptions.__struct_fields__ if name in options}
    own = {name: value for name, value in options.items() if name not in shared}
    try:
        return msgspec.convert(shared, LoadOptions, from_attributes=True), own
    except msgspec.ValidationError as error:
        raise ConfigError(f"load option: {error}") from error

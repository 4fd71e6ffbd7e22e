"""Writes quantized checkpoints: by the backend's `quantize` hook, or by loading, verifying and saving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polyquant.errors import ConfigError, SaveError, UnsupportedOperation
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading import emulation
from polyquant.loading.cache import require_kept
from polyquant.loading.load import load, prepare
from polyquant.loading.options import LoadOptions, split_options
from polyquant.loading.settle import route_of
from polyquant.loading.verify import verify
from polyquant.models.model import Model
from polyquant.packable import LIBRARY, PackableOptions
from polyquant.registry.backend import Backend
from polyquant.support.outputs import require_free


def quantize(
    model: str | Path,
    backend: str,
    out: Path,
    *,
    calibration: Sequence[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """See `polyquant.quantize`."""
    backend, options = handles.written(backend, options)
    handle = handles.backend(backend)
    require_free(out, overwrite=overwrite, keeps=(Path(model),))
    if issubclass(handle.info.options, PackableOptions):  # what is written is the library's: it needs no other layout
        options = {"kernel": LIBRARY, **options}
    how, own = split_options(options)
    require_kept(how.kv_cache, "quantize")
    emulation.require_none(how.emulate_activations, "quantize")

    if handle.can("quantize"):
        config = handle.config(own)
        found = Model.find(
            model, allow_pickle=how.allow_pickle, trust_remote_code=how.trust_remote_code, progress=how.progress
        )
        route = route_of(found.source, handle, to_quantize=True)
        request, settled = prepare(found, handle, config, own, how, route)
        return handle.quantize(
            request, settled.options, calibration or (), out, overwrite=overwrite, accept=_loads_back(handle, how)
        )
    if not handle.can("save"):
        raise UnsupportedOperation(f"{backend} cannot write checkpoints")
    if calibration is not None:
        raise ConfigError(f"{backend} quantizes without calibration text; leave calibration (--calibration) out")
    return save_verified(load(model, backend, **options), handle, out, how, overwrite=overwrite)


def save_verified(loaded: LoadedModel, handle: Backend, out: Path, how: LoadOptions, *, overwrite: bool) -> Path:
    """Write a loaded model that passes its verification, if what is written does too.

    how: it was loaded. Raises SaveError.
    """
    _require_passed(loaded)
    return handle.save(loaded, out, overwrite=overwrite, accept=_loads_back(handle, how))


def _loads_back(handle: Backend, how: LoadOptions) -> Callable[[Path], None]:
    """What is called with a checkpoint before it takes its place: it raises SaveError where that does not verify."""

    def accept(written: Path) -> None:
        _require_passed(
            load(
                written, handle.name, device=how.device, trust_remote_code=how.trust_remote_code, progress=how.progress
            )
        )

    return accept


def _require_passed(loaded: LoadedModel) -> None:
    """Raises SaveError where a model that is to be written fails its verification."""
    report = verify(loaded)
    if not report.passed:
        failed = "; ".join(map(str, report.failures))
        raise SaveError(f"not written, because verification failed: {failed}")

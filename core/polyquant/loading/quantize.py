"""Writes quantized checkpoints: by the backend's `quantize` hook, or by loading, verifying and saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyquant.errors import ConfigError, SaveError, UnsupportedOperation
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading.load import load, prepare
from polyquant.loading.options import split_options
from polyquant.loading.settle import route_of
from polyquant.loading.verify import verify
from polyquant.models.model import Model
from polyquant.options import LIBRARY, PackableOptions
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

    def accept(written: Path) -> None:
        _require_passed(
            load(written, backend, device=how.device, trust_remote_code=how.trust_remote_code, progress=how.progress)
        )

    if handle.can("quantize"):
        config = handle.config(own)
        found = Model.find(
            model, allow_pickle=how.allow_pickle, trust_remote_code=how.trust_remote_code, progress=how.progress
        )
        route = route_of(found.source, handle, to_quantize=True)
        request, settled = prepare(found, handle, config, own, how, route)
        return handle.quantize(request, settled.options, calibration or (), out, overwrite=overwrite, accept=accept)
    if not handle.can("save"):
        raise UnsupportedOperation(f"{backend} cannot write checkpoints")
    if calibration is not None:
        raise ConfigError(f"{backend} quantizes without calibration text; leave calibration (--calibration) out")
    loaded = load(model, backend, **options)
    _require_passed(loaded)
    return handle.save(loaded, out, overwrite=overwrite, accept=accept)


def _require_passed(loaded: LoadedModel) -> None:
    """Raises SaveError where a model that is to be written fails its verification."""
    report = verify(loaded)
    if not report.passed:
        failed = "; ".join(map(str, report.failures))
        raise SaveError(f"not written, because verification failed: {failed}")

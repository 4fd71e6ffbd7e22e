"""Requantizing, where a format has no place for the weights as they are: they are rounded again, behind a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from polyquant.converting.records import Conversion
from polyquant.converting.source import Source
from polyquant.errors import ConversionRefused
from polyquant.finetuning.merge import windows
from polyquant.finetuning.merge_methods import gate
from polyquant.loading.load import load
from polyquant.loading.quantize import quantize
from polyquant.plugin import checkpoints
from polyquant.registry.backend import Backend
from polyquant.support.files import atomic_folder


def requantized(
    source: Source, target: Backend, given: Mapping[str, Any], out: Path, max_kl: float,
    calibration: Sequence[str] | None, refused: ConversionRefused, *, overwrite: bool,
) -> Conversion:  # fmt: skip
    """The dequantized source, quantized by the target as of any dense model.

    max_kl: largest mean KL(source || result) in nats, on the text that comes with polyquant. Raises ConversionRefused
    above it; nothing is written then.
    """
    loaded = source.loaded
    assert loaded.request is not None
    name, backend, notes = loaded.request.source.name, loaded.backend.name, (str(refused), *source.notes)
    writing = atomic_folder(out, overwrite=overwrite, keeps=loaded.files)
    with gate(loaded, windows(loaded)) as compare, writing as partial, TemporaryDirectory(dir=partial) as folder:
        dense, written = Path(folder) / "dense", Path(folder) / "written"
        loaded.model.dequantize()
        checkpoints.save_pretrained(loaded, dense)
        quantize(dense, target.name, written, calibration=calibration, **given)
        again = load(written, target.name)
        quality = compare(again.logits)
        if quality.kl_mean > max_kl:
            raise ConversionRefused(
                f"requantized with {target.name}, the model is {quality.kl_mean:.4f} nats (KL) from the source, and "
                f"{max_kl} is allowed. Nothing was written: more bits or smaller groups (--to {target.name}:...) come "
                "closer, or raise --max-kl"
            )
        for path in written.iterdir():
            path.rename(partial / path.name)
        return Conversion(
            source=name, source_backend=backend, target_backend=target.name, options=msgspec.to_builtins(again.config),
            out=str(out), requantized=True, kl_mean=quality.kl_mean, notes=notes,
            checkpoint_bytes=sum(file.stat().st_size for file in partial.iterdir() if file.is_file()),
        )  # fmt: skip

"""Merging from the model's name to the written folder: load base and adapter, merge, compare, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polyquant.errors import ConfigError
from polyquant.finetuning import merge_methods
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading import emulation
from polyquant.loading.adapter import located, read_card
from polyquant.loading.cache import require_kept
from polyquant.loading.load import load
from polyquant.loading.quantize import quantize
from polyquant.measure.quality.records import Quality
from polyquant.measure.quality.windows import Window, cut, preset_named
from polyquant.models.generation import logits_of
from polyquant.models.resolve import resolve_dense
from polyquant.plugin import checkpoints
from polyquant.support.files import atomic_folder
from polyquant.support.outputs import require_free
from polyquant.support.texts import evaluation_text

PRESET, WINDOWS = "llamacpp-512", 2


def merge(
    model: str | Path, adapter: str | Path, out: Path, into: str, backend: str | None,
    options: Mapping[str, Any], threshold: float, *, force: bool, overwrite: bool,
) -> Quality:  # fmt: skip
    """See `polyquant.merge`."""
    require_kept(options.get("kv_cache", "keep"), "merge")
    emulation.require_none(options.get("emulate_activations"), "merge")
    into, adapter = merge_methods.target_named(into), located(str(adapter))
    require_free(out, overwrite=overwrite, keeps=(Path(model), adapter))
    backend, options = handles.written(backend, options)
    if backend is None:
        card = read_card(adapter)
        if card is None:
            raise ConfigError(f"{adapter} has no card that names its base: give the backend (--backend)")
        backend, options = card.backend, {**card.backend_options, **options}
    loaded = load(model, backend, adapter=str(adapter), **options)
    writing = atomic_folder(out, overwrite=overwrite, keeps=loaded.files)
    with merge_methods.gate(loaded, windows(loaded)) as compare, writing as partial:
        if into == "requantized":

            def again(dense: Path, written: Path) -> LoadedModel:
                return load(quantize(dense, loaded.backend.name, written, **options))

            quality = _requantized(model, adapter, loaded, again, partial, compare)
        else:
            merged = _merged(into, model, adapter, loaded)
            quality = compare(lambda tokens: logits_of(merged, tokens))
            checkpoints.save_pretrained(loaded, partial, merged)
        merge_methods.require_close(quality, threshold, into, force=force)
    return quality


def _merged(into: merge_methods.Target, model: str | Path, adapter: Path, loaded: LoadedModel) -> Any:
    dtype = loaded.config.compute_dtype
    if dtype == "auto":
        raise ConfigError("the compute dtype is not settled: load through polyquant.load")
    source = resolve_dense(model)
    if into == "dequantized":
        return merge_methods.dequantized_merged(loaded, source, dtype)
    if source.stored_quantization:
        raise ConfigError(f"{model} is quantized, there is no dense model to merge into; use into='dequantized'")
    trusted = loaded.request is not None and loaded.request.trust_remote_code
    return merge_methods.dense_merged(source, adapter, dtype, trust_remote_code=trusted)


def _requantized(
    model: str | Path, adapter: Path, loaded: LoadedModel, again: Callable[[Path, Path], LoadedModel], out: Path,
    compare: Any,
) -> Quality:  # fmt: skip
    with TemporaryDirectory(dir=out) as folder:
        dense, written = Path(folder) / "dense", Path(folder) / "written"
        checkpoints.save_pretrained(loaded, dense, _merged("dense", model, adapter, loaded))
        quality: Quality = compare(again(dense, written).logits)
        for path in written.iterdir():
            path.rename(out / path.name)
    return quality


def windows(loaded: LoadedModel) -> list[Window]:
    """What models are compared on before one takes the place of another: of the text that comes with polyquant."""
    preset = preset_named(PRESET)
    tokens = loaded.tokenizer(evaluation_text(), add_special_tokens=False).input_ids
    return cut(tokens, preset, bos=loaded.tokenizer.bos_token_id, limit=WINDOWS)

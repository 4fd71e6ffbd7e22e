"""Models as transformers makes, loads, places and writes them, for every backend on its path. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig

from polyquant.errors import PlacementError
from polyquant.loaded import LoadedModel
from polyquant.models import hf, versions
from polyquant.models.conversions import Rounded
from polyquant.options import Dtype
from polyquant.plugin import stream
from polyquant.request import LoadRequest


def empty_causal_lm(request: LoadRequest, dtype: Dtype) -> Any:
    """The model in eval mode with its parameters on the meta device; buffers, such as rotary frequencies, are real."""
    source = request.source
    config = hf.read_config(source, trust_remote_code=request.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = {"attn_implementation": request.attention} if request.attention else {}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=request.trust_remote_code,
            **versions.dtype_argument(getattr(torch, dtype)),
            **attention,
        )
    if model.can_generate():
        _read_generation_config(model, request)
    return model.eval()


def _read_generation_config(model: Any, request: LoadRequest) -> None:
    """As `from_pretrained` does: older checkpoints have it in config.json."""
    folder, own = request.source.path, (request.source.path / "generation_config.json").exists()
    named = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    if own or (folder / "config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=request.trust_remote_code, **named
        )


def single_device(request: LoadRequest) -> str:
    """The one device of the request's map. Raises PlacementError for several."""
    devices = {str(device) for device in request.device_map.values()}
    if len(devices) != 1:
        raise PlacementError(
            f"this checkpoint loads onto one device, and the device map names {', '.join(sorted(devices))}; "
            f"give device_map={{'': {request.device!r}}}"
        )
    return devices.pop()


def place(model: Any, request: LoadRequest) -> None:
    """Move a filled model to the device or devices of the request's map."""
    devices = {str(device) for device in request.device_map.values()}
    if len(devices) == 1:
        model.to(devices.pop())
    else:
        accelerate.dispatch_model(model, dict(request.device_map))


def load_causal_lm(
    request: LoadRequest, dtype: Dtype, quantization_config: Any = None, rounded: Rounded | None = None
) -> Any:
    """`AutoModelForCausalLM.from_pretrained` as every backend on transformers' own path calls it, in eval mode.

    quantization_config: quantize a dense checkpoint, tensor by tensor as `polyquant.plugin.stream` reads it; whole
    where it cannot, or where its modules go to several devices. rounded: what its quantizer does to one weight, in less
    memory; the same bit for bit.
    """
    several = len({str(device) for device in request.device_map.values()}) > 1
    if quantization_config is not None and not several and stream.is_streamed(request):
        model = empty_causal_lm(request, dtype)
        stream.quantized_by_library(model, request, dtype, quantization_config, rounded)
        return model.eval()
    source, arguments = request.source, dict[str, Any]()
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if request.attention:
        arguments["attn_implementation"] = request.attention
    with versions.progress_bars(request.progress):
        return hf.load_model(
            source,
            getattr(torch, dtype),
            trust_remote_code=request.trust_remote_code,
            device_map=dict(request.device_map),
            use_safetensors=None if request.allow_pickle or source.gguf_file else True,
            **arguments,
        )


def save_pretrained(loaded: LoadedModel, out: Path, model: Any = None) -> Path:
    """Write `model`, or the loaded one, with its tokenizer, as transformers saves them."""
    model = model or loaded.model
    with versions.progress_bars(loaded.request is not None and loaded.request.progress), versions.savable(model):
        model.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
    return out

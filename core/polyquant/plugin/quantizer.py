"""What transformers and PEFT ask of a quantized model: one mark, one quantizer object. Imports torch.

transformers marks models that its own quantizers made; others it takes for dense: casts them, trains them, saves them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from polyquant.errors import CastRefused, UnsupportedOperation
from polyquant.loaded import LoadedModel
from polyquant.memory.effective import effective_weight
from polyquant.models import versions
from polyquant.packed_weights.experts import has_packed, put_back
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear

MARK = "_polyquant"
OF_LIBRARIES = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable",
                "is_8bit_serializable")  # fmt: skip


class Marked(NamedTuple):
    """Whose model it is, and which of its modules are packed."""

    backend: str
    packed: frozenset[str]  # module names, such as model.layers.0.mlp.up_proj


def marked(model: Any) -> Marked | None:
    """The mark of a model that polyquant loaded quantized; None of any other."""
    found: Marked | None = vars(model).get(MARK)
    return found


def mark(loaded: LoadedModel) -> None:
    """Mark a loaded torch model as quantized: for PEFT, and for transformers where its own quantizer has not."""
    model, backend = loaded.model, loaded.backend
    packed = {_module(layer.name) for layer in loaded.initial_layers if layer.quantized}
    packed |= {_module(name) for name, origin in versions.tied_tensors(model).items() if _module(origin) in packed}
    if not packed:
        return
    setattr(model, MARK, Marked(backend.name, frozenset(packed)))
    if getattr(model, "hf_quantizer", None) is not None:
        return
    model.hf_quantizer = Quantizer(
        backend.name, model.config.quantization_config, loaded.config.compute_dtype, trains=backend.capabilities.trains
    )
    model.is_quantized = True
    # no name that transformers acts on: for its own 'hqq' and 'gptq' it reaches into the layers
    model.quantization_method = f"polyquant-{backend.name}"
    model._apply = MethodType(_apply_without_casts, model)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


class StoredConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed here
    """A backend's options as a checkpoint's config.json has them."""

    def __init__(self, backend: str, stored: Mapping[str, Any]) -> None:
        self.quant_method, self.stored = backend, dict(stored)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.stored)


class Quantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer of a model that polyquant quantized, as transformers knows its own."""

    def __init__(self, backend: str, stored: Any, compute_dtype: str, *, trains: bool) -> None:
        config = StoredConfig(backend, stored) if isinstance(stored, Mapping) else stored
        super().__init__(config)
        self.backend, self.compute_dtype, self.trains = backend, compute_dtype, trains

    def _process_model_before_weight_loading(self, model: Any, **more: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> Any:
        return model

    def is_serializable(self, *ignored: Any, **more: Any) -> bool:
        """No: `save_pretrained` would write tensors that nothing reads. transformers points to this warning."""
        logging.getLogger("transformers.quantizers").warning(
            "a model quantized with %s is written by loaded.save(DIR), or polyquant quantize; "
            "as a dense one by model.dequantize().save_pretrained(DIR)",
            self.backend,
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters train on it."""
        return self.trains

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model`, dense: each packed module replaced in place by one of torch's that computes the same.

        dtype: None keeps what it was loaded with. Raises UnsupportedOperation, before anything is
        replaced, for a module that holds more than a weight and a bias.
        """
        found = marked(model)
        if found is None:
            raise UnsupportedOperation("this model is not one that polyquant has quantized, or it is dense already")
        computed = getattr(torch, self.compute_dtype)
        packed = {name: model.get_submodule(name) for name in sorted(found.packed)}
        for name, module in packed.items():
            rounds = any(getattr(each, "rounds_activations", False) for each in (module, *module.children()))
            if rounds or not (_is_plain(module) or has_packed(module)):
                raise UnsupportedOperation(
                    f"{name} ({type(module).__name__}) of {self.backend} is more than a weight and a bias, so no dense "
                    "layer does the same; load the dense checkpoint instead"
                )
        for name, module in packed.items():
            if has_packed(module):
                put_back(module, computed)
            else:
                model.set_submodule(name, _dense(module, computed))
        for name, module in list(model.named_modules()):
            if isinstance(module, (HalfEmbedding, HalfLinear)):
                model.set_submodule(name, module.whole(computed))
        model.tie_weights()
        unmark(model)
        return model if dtype is None else model.to(dtype)


def unmark(model: Any) -> None:
    """Take off what `mark` put on."""
    forget_library(model)
    for name in (MARK, "_apply"):
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def forget_library(model: Any) -> None:
    """Take off what transformers' own quantizers mark a model with: its modules are others now."""
    for name in OF_LIBRARIES:
        vars(model).pop(name, None)
    model.is_quantized = False


def _is_plain(module: Any) -> bool:
    """Whether it computes what torch's linear layer does, or its embedding, which scales nothing."""
    scaled = not _is_linear(module) and any(True for _ in module.buffers())
    return not list(module.children()) and not scaled and (_is_linear(module) or hasattr(module, "num_embeddings"))


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features")


def _dense(module: Any, dtype: torch.dtype) -> torch.nn.Module:
    """A linear layer or an embedding with the weight that `module` computes with in `dtype`, frozen."""
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    dense: torch.nn.Module
    if not _is_linear(module):
        weight = module.dequantize()
        dense = torch.nn.Embedding(*weight.shape, device="meta")
    else:
        weight = effective_weight(module, module.in_features, dtype=dtype)
        bias = getattr(module, "bias", None)
        dense = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
        if bias is not None:
            dense.bias = torch.nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    dense.weight = torch.nn.Parameter(weight.to(device, dtype), requires_grad=False)
    return dense.train(module.training)


def _apply_without_casts(model: Any, function: Callable[[torch.Tensor], torch.Tensor], *more: Any, **named: Any) -> Any:
    """`nn.Module._apply`, through which `to`, `half` and the like go, of modules around this one too.

    Raises CastRefused for another dtype: packed tensors would be cast with the rest.
    """
    if any(function(torch.zeros(1, dtype=dtype)).dtype != dtype for dtype in (torch.float32, torch.float16)):
        raise CastRefused(
            f"a model quantized with {model.hf_quantizer.backend} is not cast to another dtype: its packed weights "
            "would be too. Load it with compute_dtype=..., or make it dense: model.dequantize()"
        )
    return type(model)._apply(model, function, *more, **named)

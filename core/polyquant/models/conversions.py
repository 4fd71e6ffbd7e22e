"""What transformers 5 makes of a dense checkpoint's tensors while it loads them, one after the other. Imports torch.

It renames tensors, stacks experts that are stored one by one, fuses and splits matrices, and quantizes them where a
library of its own does. Here that is asked of transformers itself, for a model whose parameters are on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from polyquant.models.versions import VERSION_5
from polyquant.request import ModelSource

Read = Callable[[str, str, bool], torch.Tensor]
"""(name in the checkpoint, name in the model, whether the one is the other) -> the tensor that is stored there."""
Rounded = Callable[[Any, torch.Tensor], Any]
"""(module of the library, dense weight) -> what transformers' quantizer makes of the weight."""


def read_in_turn(source: ModelSource, *, trust_remote_code: bool) -> bool:
    """Whether a dense checkpoint is read tensor by tensor: from safetensors, by a class of transformers 5.

    Remote code may do more while transformers loads it, older versions do not tell what they make of a checkpoint's
    tensors, and pickles are read whole: those are loaded dense first. A GGUF becomes a safetensors file before.
    """
    safe = bool(source.gguf_file) or all(file.endswith(".safetensors") for file in source.weight_files)
    return VERSION_5 and safe and not trust_remote_code


def arriving(model: Any, stored: Iterable[str], read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a model's tensors, in the order in which transformers reads them.

    stored: names of the checkpoint's tensors; those that the model's class leaves out are not read. What becomes one
    tensor, such as the experts of a layer, is read together; then it is let go.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    one = [each for each in conversions if isinstance(each, WeightRenaming)]
    many = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in many for pattern in each.source_patterns}
    own, prefix, groups = model.state_dict(), model.base_model_prefix, dict[str, Any]()
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, one, many, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name in own:
            if name not in groups:
                groups[name] = WeightRenaming(key, name) if pattern is None else deepcopy(by_pattern[pattern])
            groups[name].add_tensor(name, key, pattern or key, partial(read, key, name, pattern is None))
    model._weight_conversions = [each for each in conversions if each.was_used()]  # undone where the model is saved
    for name in list(groups):
        made = groups.pop(name).convert(name, model=model, config=model.config)
        while made:
            target, tensor = made.popitem()
            yield target, tensor[0] if isinstance(tensor, list) else tensor
            del tensor


class OnTheFly:
    """A quantizer of transformers' at work on a model whose parameters are on the meta device: `put` for each tensor.

    It puts the modules of its library in the place of the model's own first.
    """

    def __init__(
        self, model: Any, config: Any, dtype: torch.dtype, device_map: Any, rounded: Rounded | None = None
    ) -> None:
        """config: transformers' config of the quantizer. dtype: of dense tensors. rounded: does that in less memory."""
        from transformers.modeling_utils import local_torch_dtype
        from transformers.quantizers import AutoHfQuantizer

        self.rounded = rounded
        self.model, self.quantizer = model, AutoHfQuantizer.from_config(config, pre_quantized=False)
        self.quantizer.validate_environment(device_map=device_map, weights_only=True)
        model.config.quantization_config = config
        with local_torch_dtype(dtype), torch.device("meta"):
            self.quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map, use_kernels=False)

    def takes(self, name: str) -> bool:
        """Whether the tensor of that name in the model is quantized."""
        return bool(self.quantizer.param_needs_quantization(self.model, name))

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Quantize a tensor, and put what comes of it where it belongs."""
        if self.rounded is not None and name.endswith(".weight"):
            module = self.model.get_submodule(name.removesuffix(".weight"))
            module.weight, module._is_hf_initialized = self.rounded(module, tensor), True
            return
        operation = self.quantizer.get_quantize_ops()
        made = operation.convert(
            {name: [tensor]}, full_layer_name=name, model=self.model, config=self.model.config, missing_keys=set()
        )
        for target, packed in made.items():
            owner, _, short = target.rpartition(".")
            is_parameter = isinstance(packed, torch.nn.Parameter)
            setattr(
                self.model.get_submodule(owner),
                short,
                packed if is_parameter else torch.nn.Parameter(packed, requires_grad=packed.is_floating_point()),
            )

    def finish(self) -> None:
        """Let the model know its quantizer, once every tensor is there."""
        self.model.hf_quantizer = self.quantizer
        self.quantizer.postprocess_model(self.model)

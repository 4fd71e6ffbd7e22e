"""The tensors of a model before quantization, read off its skeleton."""

from __future__ import annotations

from typing import Any

from polyquant.models import versions
from polyquant.models.experts import how_stacked
from polyquant.models.roles import beside_the_language_model, role_of
from polyquant.types import WeightInfo


def list_weights(skeleton: Any) -> list[WeightInfo]:
    """Every parameter and buffer of `skeleton`, tied ones too (they name the tensor they share)."""
    in_float32 = versions.kept_in_float32(skeleton, str(skeleton.dtype).removeprefix("torch."))
    is_tower = beside_the_language_model(skeleton)
    left_alone = versions.never_quantized(skeleton)
    head, tied = skeleton.get_output_embeddings(), versions.tied_tensors(skeleton)
    default_dense = versions.default_dense_modules(skeleton)
    weights = []
    for module_name, module in skeleton.named_modules():
        for is_buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for short, tensor in tensors.items():
                if tensor is None:
                    continue
                name = f"{module_name}.{short}" if module_name else short
                weights.append(
                    WeightInfo(
                        name=name,
                        shape=tuple(tensor.shape),
                        dtype="float32" if in_float32(name) else str(tensor.dtype).removeprefix("torch."),
                        role=role_of(tensor, module, head=head, is_buffer=is_buffer, tower=is_tower(module_name)),
                        module=type(module).__name__,
                        tied_to=tied.get(name, ""),
                        default_skip=module_name in default_dense or left_alone(name),
                        stacked=how_stacked(module, short),
                    )
                )
    return weights

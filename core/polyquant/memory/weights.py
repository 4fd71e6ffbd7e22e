"""The tensors of a model before quantization, read off its skeleton."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import msgspec

from polyquant.errors import ConfigError, did_you_mean
from polyquant.memory.roles import role_of
from polyquant.models import versions
from polyquant.options import BackendOptions
from polyquant.types import WeightInfo


def list_weights(skeleton: Any) -> list[WeightInfo]:
    """Every parameter and buffer of `skeleton`, tied ones too (they name the tensor they share)."""
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
                        dtype=str(tensor.dtype).removeprefix("torch."),
                        role=role_of(tensor, module, head=head, is_buffer=is_buffer),
                        module=type(module).__name__,
                        tied_to=tied.get(name, ""),
                        default_skip=module_name in default_dense,
                    )
                )
    return weights


def resolved_skips(weights: list[WeightInfo], config: BackendOptions) -> BackendOptions:
    """`config` with `skip` as full module names, defaults and tied modules included; `skip_defaults` is then spent.

    Raises ConfigError for a pattern that matches nothing.
    """
    asked = matching_modules(weights, config.skip)
    modules = {weight.name.rpartition(".")[0]: weight for weight in weights if weight.role != "vector"}
    tied = {weight.tied_to for weight in weights}
    always = [name for name, weight in modules.items() if weight.tied_to or weight.name in tied]
    defaults = [name for name, weight in modules.items() if config.skip_defaults and weight.default_skip]
    skip = tuple(dict.fromkeys([*asked, *defaults, *always]))
    return msgspec.structs.replace(config, skip=skip, skip_defaults=False)


def matching_modules(weights: list[WeightInfo], patterns: tuple[str, ...]) -> list[str]:
    """Names of the matrix-bearing modules that any of `patterns` matches.

    A pattern is a run of name parts, anywhere in the name: 'layers.0', 'down_proj', 'layers.*.mlp', 'lm_head'.
    Raises ConfigError for a pattern that matches nothing.
    """
    names = [
        weight.name.rpartition(".")[0]
        for weight in weights
        if weight.role in ("linear", "experts", "head", "embedding", "other")
    ]
    matched: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            parts = sorted({part for name in names for part in name.split(".")})
            raise ConfigError(
                f"skip pattern {pattern!r} matches no module; name parts here are {', '.join(parts[:24])}."
                f"{did_you_mean(pattern, parts)}"
            )
        matched.update(dict.fromkeys(hits))
    return list(matched)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern`, with its *, is a run of parts of `name`."""
    parts = name.split(".")
    runs = (parts[start:end] for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    return any(fnmatchcase(".".join(run), pattern) for run in runs)

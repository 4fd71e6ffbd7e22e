"""Merges an adapter into its base, in one of three ways, and compares the result with base and adapter first.

dense: into the dense model that the base was quantized from. The adapter then corrects errors that are no longer there.
dequantized: into the dequantized base: the closest to what was trained, and as large as the dense model.
requantized: into the dense model, which is quantized again with the same backend: small, and rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from polyquant.errors import ConfigError, MergeRefused, did_you_mean
from polyquant.loaded import LoadedModel
from polyquant.loading import dense
from polyquant.loading.adapter import adapted_modules, attach_to
from polyquant.measure.quality import stored
from polyquant.measure.quality.metrics import Tally
from polyquant.measure.quality.records import Quality
from polyquant.measure.quality.windows import Window
from polyquant.memory.adapted import base_name, is_adapters, unwrapped
from polyquant.memory.effective import effective_weight
from polyquant.models import hf, versions
from polyquant.options import Dtype
from polyquant.request import ModelSource

Target = Literal["dense", "dequantized", "requantized"]


def target_named(into: str) -> Target:
    """The target of this name, as a verb too. Raises ConfigError for another."""
    targets: dict[str, Target] = {target: target for target in get_args(Target)}
    found = targets.get(into) or targets.get(f"{into}d")
    if found is None:
        raise ConfigError(f"into must be one of {', '.join(targets)}, got {into!r}.{did_you_mean(into, targets)}")
    return found


def dense_merged(source: ModelSource, adapter: Path, dtype: Dtype, *, trust_remote_code: bool = False) -> Any:
    """The dense model with the adapter's product added to its weights."""
    model = dense.load_dense(source, dtype, trust_remote_code=trust_remote_code)
    _untie_adapted(model, adapted_modules(adapter))
    return attach_to(model, adapter).merge_and_unload()


def dequantized_merged(loaded: LoadedModel, source: ModelSource, dtype: Dtype) -> Any:
    """A dense model whose layers compute what those of `loaded`, adapter included, do.

    A linear layer's weight is what it answers to the identity, an embedding's rows what it answers to every token,
    whatever they store: no backend is asked.
    """
    wrapped = loaded.model.get_base_model()
    tensors = _effective_tensors(wrapped)
    asked = {_owner(layer.name) for layer in loaded.layers if layer.quantized}
    adapted = {kind: _with_part(wrapped, kind) for kind in ("lora_A", "modules_to_save", "token_adapter")}
    asked |= adapted["lora_A"] | adapted["token_adapter"]
    trusted = loaded.request is not None and loaded.request.trust_remote_code
    model = hf.skeleton(source, dtype, trust_remote_code=trusted)
    _untie_adapted(model, adapted["lora_A"] | adapted["modules_to_save"])  # trained tokens are tied as the tensors are
    model = model.to_empty(device="cpu")
    _copy_buffers(model, wrapped)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _owner(name) in asked and name.endswith(".weight"):
                parameter.copy_(_answered(wrapped.get_submodule(_owner(name)), parameter))
            elif name in tensors:
                parameter.copy_(tensors[name])
            else:  # experts, packed as one tensor
                parameter.copy_(wrapped.get_submodule(name).dequantize())
    model.tie_weights()
    return model.eval()


def _answered(layer: Any, weight: Any) -> Any:
    """The weight, of the shape of `weight`, by which `layer` computes."""
    base = unwrapped(layer)
    if not hasattr(base, "num_embeddings"):
        return effective_weight(layer, weight.shape[1])
    device = next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
    rows = layer(torch.arange(weight.shape[0], device=device)).float().cpu()
    scale = getattr(base, "embed_scale", None)  # Gemma's
    return rows if scale is None else rows / torch.as_tensor(scale).float().cpu()


def _effective_tensors(wrapped: Any) -> dict[str, Any]:
    """The tensors of the base by their names in it, those that `modules_to_save` replaces as they were trained."""
    tensors = {base_name(name): tensor for name, tensor in wrapped.state_dict().items() if not is_adapters(name)}
    for name, module in wrapped.named_modules():
        if not hasattr(module, "modules_to_save"):
            continue
        for active in module.active_adapters:
            own = module.modules_to_save[active].state_dict() if active in module.modules_to_save else {}
            tensors |= {f"{base_name(name)}.{key}": tensor for key, tensor in own.items()}
    return tensors


def _untie_adapted(model: Any, adapted: Collection[str]) -> None:
    """Untie a dense model's head where the adapter changes head or embedding: they then are no longer one tensor."""
    tied = {_owner(name) for pair in versions.tied_tensors(model).items() for name in pair}
    if tied & set(adapted):
        versions.untie(model)


def _with_part(wrapped: Any, part: str) -> set[str]:
    """Names in the base of the modules that PEFT has wrapped in one with this attribute."""
    return {base_name(name) for name, module in wrapped.named_modules() if hasattr(module, part)}


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


@contextmanager
def gate(
    loaded: LoadedModel, windows: Sequence[Window]
) -> Iterator[Callable[[Callable[[Sequence[int]], Any]], Quality]]:
    """Within the block, compares logits of a merged model with those of base and adapter on `windows`."""
    with TemporaryDirectory() as folder:
        index = stored.store(Path(folder) / "reference", "merge", "merge", windows, loaded.logits)

        def compare(logits: Callable[[Sequence[int]], Any]) -> Quality:
            tally = Tally()
            for window, reference in stored.read(Path(folder) / "reference", index):
                targets = torch.tensor(window.tokens[window.first_scored :])
                tally.add(reference, stored.scored(logits(window.tokens), window).cpu(), targets)
            return tally.result("merge", storage_error=index.storage_error)

        yield compare


def require_close(quality: Quality, threshold: float, into: Target, *, force: bool) -> None:
    """Raises MergeRefused where the merged model is further than `threshold` nats from base and adapter."""
    if quality.kl_mean <= threshold or force:
        return
    way_out = "keep the adapter beside its base (--adapter)"  # nothing is closer to what was trained
    if into != "dequantized":
        way_out = "try into='dequantized' (--into dequantized)"
    raise MergeRefused(
        f"merged into {into!r}, the model is {quality.kl_mean:.4f} nats (KL) from base and adapter, with the same "
        f"first token in {quality.top1:.1%} of {quality.tokens_scored} positions; {threshold} is allowed. "
        f"Nothing was written: {way_out}, or accept it with force=True (--force)"
    )


def _copy_buffers(model: Any, origin: Any) -> None:
    for name, buffer in origin.named_buffers():
        owner, _, short = base_name(name).rpartition(".")
        module = model.get_submodule(owner) if _has(model, owner) else None
        if module is not None and short in module._buffers:
            module._buffers[short] = buffer.detach().cpu().clone()


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True

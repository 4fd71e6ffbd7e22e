"""Merges an adapter into its base, in one of three ways, and compares the result with base and adapter first.

dense: into the dense model that the base was quantized from. The adapter then corrects errors that are no longer there.
dequantized: into the dequantized base: the closest to what was trained, and as large as the dense model.
requantized: into the dense model, which is quantized again with the same backend: small, and rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from polyquant.errors import MergeRefused
from polyquant.loaded import LoadedModel
from polyquant.loading import dense
from polyquant.loading.adapter import attach_to
from polyquant.measure.quality import stored
from polyquant.measure.quality.metrics import Tally
from polyquant.measure.quality.records import Quality
from polyquant.measure.quality.windows import Window
from polyquant.memory.adapted import BASE_LAYER
from polyquant.memory.effective import effective_weight
from polyquant.models import hf
from polyquant.options import Dtype
from polyquant.request import ModelSource

Target = Literal["dense", "dequantized", "requantized"]


def dense_merged(source: ModelSource, adapter: Path, dtype: Dtype, *, trust_remote_code: bool = False) -> Any:
    """The dense model with the adapter's product added to its weights."""
    model = dense.load_dense(source, dtype, trust_remote_code=trust_remote_code)
    return attach_to(model, adapter).merge_and_unload()


def dequantized_merged(loaded: LoadedModel, source: ModelSource, dtype: Dtype) -> Any:
    """A dense model whose layers compute what those of `loaded`, adapter included, do.

    A linear layer's weight is what it answers to the identity, whatever it stores: no backend is asked.
    """
    wrapped = loaded.model.get_base_model()
    tensors = {name.replace(f".{BASE_LAYER}.", "."): tensor for name, tensor in wrapped.state_dict().items()}
    packed = {layer.name.rpartition(".")[0] for layer in loaded.layers if layer.quantized}
    packed |= {layer.name.partition(".lora_")[0] for layer in loaded.layers if layer.role == "adapter"}
    trusted = loaded.request is not None and loaded.request.trust_remote_code
    model = hf.skeleton(source, dtype, trust_remote_code=trusted).to_empty(device="cpu")
    _copy_buffers(model, wrapped)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, short = name.rpartition(".")
            if owner in packed and short == "weight":
                parameter.copy_(effective_weight(wrapped.get_submodule(owner), parameter.shape[1]))
            else:
                parameter.copy_(tensors[name])
    model.tie_weights()
    return model.eval()


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
    other = {"dense": "dequantized", "dequantized": "dense", "requantized": "dequantized"}[into]
    raise MergeRefused(
        f"merged into {into!r}, the model is {quality.kl_mean:.4f} nats (KL) from base and adapter, with the same "
        f"first token in {quality.top1:.1%} of {quality.tokens_scored} positions; {threshold} is allowed. "
        f"Nothing was written: try into={other!r} (--into {other}), or accept it with force=True (--force)"
    )


def _copy_buffers(model: Any, origin: Any) -> None:
    for name, buffer in origin.named_buffers():
        owner, _, short = name.rpartition(".")
        module = model.get_submodule(owner) if BASE_LAYER not in owner and _has(model, owner) else None
        if module is not None and short in module._buffers:
            module._buffers[short] = buffer.detach().cpu().clone()


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True

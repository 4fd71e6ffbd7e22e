"""Settles a load: by which route, with which options, in which dtype, of which weights. Decided here and nowhere else.

`load`, `plan`, `verify`, `quantize`, `compare` and `recommend` read the record. What it says follows from the model,
the backend's card and the options; never from what an earlier command left in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import msgspec

from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.loading import kernel, vocabulary
from polyquant.loading.stored import method_of, reconcile, stored_options
from polyquant.memory.predicted import Checkpoint
from polyquant.models.model import Model
from polyquant.modules import module_of
from polyquant.options import BackendOptions, Dtype, pairs_of
from polyquant.packable import is_packed, packs_any
from polyquant.registry.catalogue import maker_of
from polyquant.request import ModelSource
from polyquant.support.shown import Look, Looked
from polyquant.types import BackendInfo, LayerPlan, Record, WeightInfo

Route = Literal["as stored", "on the fly", "dense first", "make first"]
"""as stored: the checkpoint is quantized, and the backend reads it. on the fly: it is dense, and quantized while it is
loaded. dense first: a GGUF that the backend does not read becomes a dense checkpoint, which is quantized on the fly.
make first: the backend loads only checkpoints that it has quantized before."""


class Quantizer(Protocol):
    """What settling needs of a backend's handle."""

    name: str

    @property
    def info(self) -> BackendInfo: ...
    def can(self, hook: str) -> bool: ...
    def plan_layers(self, weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]: ...


class Settled(Looked, Record, frozen=True):
    """A load, with every question answered that does not depend on the machine's free memory."""

    route: Route
    options: BackendOptions  # effective: compute dtype chosen, skipped modules named in full
    device: str
    dtype: Dtype  # of activations and dense weights
    weights: tuple[WeightInfo, ...]  # of the model by its architecture, as they are held; none for a runtime of GGUFs
    checkpoint: Checkpoint  # the files that the load reads, when those come first that have to
    notes: tuple[str, ...] = ()

    def look(self) -> Look:
        what = f"{self.route}, {self.dtype} on {self.device}, {len(self.weights)} tensors"
        return Look(f"{what}, {self.options}", notes=self.notes)


def route_of(source: ModelSource, backend: Quantizer, *, to_quantize: bool = False) -> Route:
    """By which route `backend` comes to `source`.

    to_quantize: for its `quantize` hook, which takes a dense model whatever the backend loads.
    Raises CheckpointConflict for a checkpoint that it neither reads nor can make.
    """
    can, method = backend.info.capabilities, method_of(source)
    reads = method in can.loads_prequantized
    if method == "gguf" and can.makes_from == "gguf":
        return "make first" if to_quantize else "as stored"
    if method == "gguf" and (source.packaged or not reads):
        return "dense first" if can.on_the_fly else _made_first(source, backend)
    if to_quantize and method and method != "gguf":
        raise CheckpointConflict(f"{source.name} is quantized already with {method!r}; give the dense model")
    if method and not to_quantize:
        if not reads:
            raise CheckpointConflict(
                f"{source.name} is quantized already with {method!r}; "
                f"{backend.name} reads {', '.join(can.loads_prequantized) or 'no quantized checkpoints'}. "
                "Leave the backend out to have it chosen, or give the dense model"
            )
        return "as stored"
    return "on the fly" if can.on_the_fly else _made_first(source, backend)


def _made_first(source: ModelSource, backend: Quantizer) -> Route:
    can = backend.info.capabilities
    if can.makes_from == "gguf" or backend.can("quantize"):
        return "make first"
    raise CheckpointConflict(
        f"{source.name} is dense, and {backend.name} loads quantized checkpoints only "
        f"({', '.join(can.loads_prequantized)}); it makes none of a dense model: give one that "
        "was made elsewhere, or take another backend"
    )


def needs_dense_file(source: ModelSource, backend: Quantizer, route: Route) -> bool:
    """Whether a dense checkpoint has to be made of a GGUF before the backend can begin."""
    takes_it = backend.info.capabilities.makes_from == "gguf"
    return bool(source.gguf_file) and route in ("dense first", "make first") and not takes_it


def settle(
    model: Model, backend: Quantizer, config: BackendOptions, given: Mapping[str, object], device: str, route: Route
) -> Settled:
    """Settle the load of `model` with `backend` on `device`.

    config: the checked options; given: as the user wrote them. Raises CheckpointConflict where they contradict what is
    stored, ConfigError for a skip pattern that matches nothing, ModelError where transformers cannot build the model.
    """
    source, notes = model.source, list[str]()
    stored = route == "as stored"
    if stored:
        config = reconcile(source, stored_options(source, backend.info, method_of(source)), config, given, backend.info)
    elif needs_dense_file(source, backend, route):
        notes.append(f"{source.gguf_file} is dequantized to a float32 checkpoint first, then quantized again")
    if packs_any(config) and device != "cpu":
        raise ConfigError(
            f"kernel='packed', embeddings, head and experts are for a CPU so far, and this is {device}: take "
            "kernel='library', and leave the others out"
        )
    may_be_packed = kernel.may_be_packed(config, backend, device)
    dtype = compute_dtype(config, backend.info, device)
    config = msgspec.structs.replace(config, compute_dtype=dtype)
    only_gguf = backend.info.capabilities.makes_from == "gguf"  # its runtime may know models that transformers does not
    weights = () if only_gguf else _weights(model, dtype, stored)
    if towers := list(dict.fromkeys(".".join(w.name.split(".")[:2]) for w in weights if w.role == "tower")):
        notes.append(f"vision and audio parts stay dense: {', '.join(towers)}")
    checkpoint = _checkpoint(model, weights, route)
    if stored:
        agreed, config = config, _skipping_what_is_dense(model, weights, config)
        if config is not agreed and config.skip:
            notes.append(f"{len(config.skip)} layers are dense in the checkpoint: {', '.join(config.skip[:3])}")
    elif not only_gguf:
        config = config.with_full_names(weights)
    if may_be_packed:
        wide = weights if dtype == "float32" else _weights(model, "float32", stored)
        if (packed := kernel.packed(config, wide, backend)) is not None:
            config, dtype, weights = packed, "float32", wide
    held = {name: tensor.dtype for name, tensor in model.outline.tensors.items()} if route != "dense first" else {}
    config, weights, rounded = vocabulary.settled(config, weights, held, checkpoint.dtype, backend)
    return Settled(
        route=route, options=config, device=device, dtype=dtype, weights=weights,
        checkpoint=checkpoint, notes=(*notes, *rounded),
    )  # fmt: skip


def _weights(model: Model, dtype: Dtype, stored: bool) -> tuple[WeightInfo, ...]:
    weights = model.weights(dtype)
    return model.with_parts(weights) if stored else weights


def _skipping_what_is_dense(model: Model, weights: Sequence[WeightInfo], config: BackendOptions) -> BackendOptions:
    """`config` with `skip` as the checkpoint's headers have it, whatever words its quantization_config has for that.

    Unchanged where they agree, where the checkpoint names its tensors otherwise than the model, and where all look
    dense: some formats hold weights that are quantized as they load.
    """
    matrices = [weight for weight in weights if weight.role in ("linear", "head") and not weight.tied_to]
    dense = {weight.name for weight in matrices if model.holds_dense(weight)}
    found = all(weight.name in dense or model.holds_part(weight) for weight in matrices)
    if (
        not found
        or len(dense) == len(matrices)
        or dense == {weight.name for weight in matrices if config.skips(weight)}
    ):
        return config
    skip = tuple(module_of(weight) for weight in matrices if weight.name in dense)
    return msgspec.structs.replace(config, skip=skip, skip_defaults=False)


@contextmanager
def as_stored(settled: Settled, source: str, backend: str) -> Iterator[None]:
    """In the block, what does not fit a stored checkpoint is the checkpoint's: its options cannot be chosen any more.

    Raises ModelError in place of a ConfigError that advises options.
    """
    try:
        yield
    except ConfigError as error:
        if settled.route != "as stored" or not error.unfit:
            raise
        raise ModelError(
            f"{source}: {backend} cannot read this checkpoint: {error.unfit}; its options are stored with it, so take "
            "another checkpoint, or quantize the dense model"
        ) from error


def make_command(model: str, backend: Quantizer, options: Mapping[str, object]) -> str:
    """The command that makes the checkpoint which the route 'make first' needs."""
    takes_dense = backend.info.capabilities.makes_from == "dense"
    maker, own = (backend.name, options) if takes_dense else (maker_of(backend.info.capabilities.makes_from), {})
    return f"polyquant quantize {model} --backend {maker}{as_flags(own)} --out DIR"


def as_flags(options: Mapping[str, object]) -> str:
    """Options as the command line takes them, with a blank before each."""
    return "".join(f" {word}" for word in flag_words(options))


def flag_words(options: Mapping[str, object]) -> list[str]:
    """Options as the words of a command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "layers":  # of MixableOptions, in any of the forms that users write
            words += [word for pattern, chosen in pairs_of(value) for word in ("--layer", f"{pattern}={chosen}")]
        elif isinstance(value, Mapping):
            words += [f"--{flag}", ",".join(f"{key}={entry}" for key, entry in value.items())]
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return words


def compute_dtype(config: BackendOptions, info: BackendInfo, device: str) -> Dtype:
    """The one compute dtype of a load: as asked, else the backend's measured choice for the kind of device.

    CUDA without a choice of the backend's: bfloat16 from compute capability 8.0, float16 below; a GPU that is not here
    is taken to be one that has bfloat16.
    """
    kind = device.partition(":")[0]
    if config.compute_dtype != "auto":
        return config.compute_dtype
    if is_packed(config):
        return "float32"
    if kind in info.compute_dtypes:
        return info.compute_dtypes[kind]
    if kind != "cuda":
        return "bfloat16"
    import torch

    older = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return "float16" if older else "bfloat16"


def _checkpoint(model: Model, weights: tuple[WeightInfo, ...], route: Route) -> Checkpoint:
    """What the load reads: the files as they are, or the dense checkpoint that they are made into first."""
    outline = model.outline
    if route == "as stored":
        embeddings = (outline.tensors.get(weight.name) for weight in weights if weight.role == "embedding")
        dtype = next((found.dtype for found in embeddings if found), outline.dtype)
        return Checkpoint(nbytes=outline.checkpoint_bytes, dtype=dtype, quantized=True)
    dtype = "float32" if model.source.gguf_file else outline.dtype
    in_turn = route != "make first" and model.is_read_in_turn()
    return Checkpoint(nbytes=model.dense_file_bytes(weights), dtype=dtype, quantized=False, in_turn=in_turn)

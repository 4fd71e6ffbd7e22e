"""Checkpoints of packed weights that transformers itself does not read or write: config.json and safetensors.

For backends whose library leaves no format of transformers' own; never pickle. Imports torch.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from huggingface_hub import save_torch_state_dict
from tqdm import tqdm

from polyquant.errors import ConfigError, ModelError, SaveError
from polyquant.loaded import LoadedModel
from polyquant.memory.planned import is_linear
from polyquant.models import hf, versions
from polyquant.models.checks import check_folder
from polyquant.models.hf import load_tokenizer, read_config
from polyquant.models.versions import tied_tensors
from polyquant.modules import module_of
from polyquant.options import BackendOptions, Dtype
from polyquant.packed_weights.experts import ExpertStack, put_in
from polyquant.plugin import stream
from polyquant.plugin.dtypes import cast_dense, dense_dtypes, stored_dtype
from polyquant.plugin.experts import stored_part
from polyquant.plugin.layers import fill_empty
from polyquant.plugin.pretrained import empty_causal_lm, load_causal_lm, place, save_pretrained, single_device
from polyquant.plugin.tensors import own_tensors, packed_modules
from polyquant.request import LoadRequest, ModelSource
from polyquant.types import WeightInfo

__all__ = [
    "MODEL", "OWN_FORMAT", "as_packed", "complete", "dense_dtypes", "empty_causal_lm", "fill", "load_causal_lm",
    "load_tokenizer", "packed_modules", "place", "put", "quantize_layers", "read_config", "read_layers",
    "require_linears", "require_packed", "save", "save_pretrained", "single_device", "stored_dtype", "tied_tensors",
    "with_stored_skips",
]  # fmt: skip
Options = TypeVar("Options", bound=BackendOptions)
OWN_FORMAT, MODEL = "packed", "model"
"""What the files of a checkpoint are called that transformers cannot read, and that it can."""


def read_layers(
    request: LoadRequest,
    dtype: Dtype,
    names: Sequence[str],
    make: Callable[[str, Any, dict[str, torch.Tensor]], Any],
    *,
    owner: Callable[[str], str] = str,
    part: Callable[[str], tuple[str, str]] | None = None,
    check: Callable[[str, torch.Tensor], None] | None = None,
    leave_out: Callable[[str], bool] = lambda name: False,
    joined: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Any:
    """The model of a checkpoint, on its device: the modules `names` made of their packed tensors, the rest in `dtype`.

    make: (name, dense module on the meta device, its tensors by their names inside it) -> the module in its place. Of
    fused experts the name is their tensor's, which is given; an `ExpertStack` takes its place.
    owner: a tensor's module -> the module that it belongs to, where a packed one has parts. part: a tensor's name in
    its file -> the module that it belongs to, and its name there, where those do not follow from its module. check:
    called with the name and tensor of everything else. leave_out: whether a tensor of that name is none of the model's.
    joined: called with everything else by name at last, to put together what is stored in parts.
    Raises ModelError, with the names of checkpoint and module, where `make` does.
    """
    source, wanted, dtypes = request.source, getattr(torch, dtype), dense_dtypes(request)
    model = empty_causal_lm(request, dtype)
    quantized, dense = set(names), dict[str, torch.Tensor]()
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for stored, tensor in own_tensors(model, source):
        if leave_out(stored):
            continue
        name = request.names.get(stored, stored)
        if part is None:
            home = owner(name.rpartition(".")[0])
            short = name.removeprefix(f"{home}.")
        else:
            home, short = part(stored)
        if home in quantized:
            layers[home][short] = tensor
            continue
        if name in dense:
            raise ModelError(f"{source.name}: {name} is stored in several tensors, which are not put together here")
        if check is not None:
            check(name, tensor)
        as_stored = name in request.later or not tensor.is_floating_point()
        dense[name] = tensor if as_stored else cast_dense(source, name, tensor, dtypes.get(name, wanted))
    for name in tqdm(names, desc="Loading", unit="layer", disable=not request.progress):
        try:
            layer = make(name, stream.named(model, name), layers.pop(name, {}))
        except (AttributeError, ModelError) as error:
            raise ModelError(f"{source.name}: {name} cannot be read: {error}") from error
        put(model, name, layer)
    if joined is not None:
        joined(dense)
    fill(model, dense, source)
    place(model, request)
    return model


def quantize_layers(
    request: LoadRequest,
    dtype: Dtype,
    names: Sequence[str],
    make: Callable[[str, Any], Any],
    *,
    on_cpu: bool = True,
    after: Callable[[Any], None] | None = None,
    by_rows: bool = False,
) -> Any:
    """The dense model, its modules `names` replaced one by one by what is made of them; everything else in `dtype`.

    The twin of `read_layers`. make: (name, dense module or tensor of experts) -> the module in its place, whose
    tensors, but for a bias, keep the dtypes they have. on_cpu: quantize there, and move the model afterwards; else on
    the device of the request.
    after: called with the model where what others are tied to has been replaced, and before its dense tensors are cast
    and moved, to tie them. by_rows: `make` takes weights of modules with `layers.rows_of`; they may be in the file.
    Each is handed over in the checkpoint's dtype, and read when its turn comes; see `polyquant.plugin.stream`.
    Raises ModelError, with the checkpoint's name, where `make` does.
    """
    source, wanted, dtypes = request.source, getattr(torch, dtype), dense_dtypes(request)
    where = msgspec.structs.replace(request, device_map={"": "cpu"}) if on_cpu else request
    held, turns = stored_dtype(source, dtype), iter(names)
    if streamed := stream.is_streamed(request):
        model = empty_causal_lm(request, held)
        tied = set() if after is not None else set(tied_tensors(model).values())
        rows = {f"{name}.weight" for name in names}.difference(tied) if by_rows else set()
        turns = stream.quantized_in_turn(model, request, held, names, where.device_map, rows)
    else:
        model = load_causal_lm(where, held)
    ties = [(tied.rpartition(".")[0], origin.rpartition(".")[0]) for tied, origin in tied_tensors(model).items()]
    for name in tqdm(turns, desc="Quantizing", unit="layer", total=len(names), disable=not request.progress):
        try:
            layer = make(name, stream.named(model, name))
        except ModelError as error:
            raise ModelError(f"{source.name}: {name} cannot be quantized: {error}") from error
        put(model, name, layer)
        del layer
        if after is not None and any(origin == name for _, origin in ties):
            after(model)
        stream.packed_at_once(model, name)
    made = {*names, *request.later}
    if streamed:
        made |= {name.removesuffix(".weight") for name in stream.rounded_tables()}
    made |= {tied for tied, origin in ties if origin in made}
    for name, parameter in model.named_parameters():
        is_packed = name.rpartition(".")[0] in made and not name.endswith(".bias")
        if name not in request.later and parameter.is_floating_point() and not is_packed:
            parameter.data = cast_dense(source, name, parameter.data, dtypes.get(name, wanted))
    model.config.dtype = wanted
    if on_cpu or streamed:
        place(model, request)
    return model


def put(model: Any, name: str, layer: Any) -> None:
    """Put a quantized module in the place of a dense one, or a stack in that of a tensor of fused experts."""
    if isinstance(layer, ExpertStack):
        owner, _, short = name.rpartition(".")
        put_in(model.get_submodule(owner), short, layer)
    else:
        model.set_submodule(name, layer)


def as_packed(
    config: Options, request: LoadRequest, parts: tuple[str, ...], *, beside: Mapping[str, str] = {}
) -> tuple[Options, list[str]]:  # fmt: skip
    """`with_stored_skips` of the modules that have a tensor called like one of `parts` in the checkpoint.

    beside: a part -> what a module with it has to have too, where others have tensors of that name.

    Experts, and what the model's class leaves out, such as layers for predicting several tokens, are none of them.
    """
    ignored = hf.ignored_tensors(request.source)
    found = packed_modules(request.source, tuple(part for part in parts if part not in beside))
    for part, other in beside.items():
        found |= packed_modules(request.source, (part,)) & packed_modules(request.source, (other,))
    packed = {
        request.names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in found
        if not any(re.search(pattern, f"{name}.weight") for pattern in ignored)
        and not any(stored_part(f"{name}.{part}", request.names) for part in parts)
    }  # fmt: skip
    return with_stored_skips(config, request.weights, packed, request.source)


def with_stored_skips(
    config: Options, weights: Sequence[WeightInfo], quantized: Collection[str], source: ModelSource
) -> tuple[Options, list[str]]:
    """`config` with `skip` as the checkpoint has it, whose packed modules are `quantized`; a note where that differs.

    Raises ModelError where no module is packed, or one that is has no Linear module in the model.
    """
    anything = msgspec.structs.replace(config, skip=(), skip_defaults=False)
    linears = [module_of(weight) for weight in weights if is_linear(weight, anything)]
    if not quantized:
        raise ModelError(f"{source.name}: its config says that it is quantized, and no tensor in it is")
    if astray := sorted(set(quantized).difference(linears)):
        named = ", ".join(astray[:3])
        raise ModelError(f"{source.name}: {len(astray)} packed layers have no Linear module in the model: {named}")
    if set(quantized) == {module_of(weight) for weight in weights if is_linear(weight, config)}:
        return config, []
    dense = tuple(name for name in linears if name not in quantized)
    notes = [f"{len(dense)} layers are dense in the checkpoint: {', '.join(dense[:3])}"] if dense else []
    return msgspec.structs.replace(config, skip=dense, skip_defaults=False), notes


def require_linears(weights: Sequence[WeightInfo], config: BackendOptions) -> None:
    """Raises ConfigError where a matrix of a block is no Linear module's, such as fused experts, and is not skipped."""
    for weight in weights:
        other = weight.role == "experts" or (weight.role == "linear" and "Linear" not in weight.module)
        if other and module_of(weight) not in config.skip:
            raise ConfigError(
                f"{weight.name} is no Linear module but {weight.module} with shape {weight.shape}; "
                "this backend quantizes Linear modules only"
            )


def complete(out: Path, source: ModelSource, skip: Sequence[str], tokenizer: Any) -> None:
    """Finish a checkpoint that a library wrote: the skipped modules, tokenizer and generation config.

    skip: full names of the modules that were to stay dense.
    """
    for path in (out / "config.json", out / "quantize_config.json"):
        if path.exists():
            content = json.loads(path.read_text())
            content.get("quantization_config", content)["skip_modules"] = list(skip)
            path.write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    if (source.path / "generation_config.json").exists():
        shutil.copy(source.path / "generation_config.json", out)


def require_packed(out: Path, modules: Sequence[str], library: str) -> None:
    """Raises SaveError where one of `modules` has no `qweight` in the checkpoint that `library` wrote."""
    packed = packed_modules(check_folder(out, str(out)), ("qweight",))
    if left := [name for name in modules if name not in packed]:
        raise SaveError(f"{library} left {len(left)} of {len(modules)} layers dense: {', '.join(left[:3])}")


def fill(model: Any, tensors: Mapping[str, torch.Tensor], source: ModelSource) -> None:
    """Assign `tensors` to the parameters and buffers of `model`, and tie what is tied.

    Raises ModelError where a parameter is left on the meta device, or a tensor fits nothing.
    """
    try:
        fill_empty(model, tensors, tied=versions.tied_tensors(model))
    except ModelError as error:
        raise ModelError(f"{source.name}: {error}") from error
    model.tie_weights()


def save(
    loaded: LoadedModel,
    out: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    quantization_config: dict[str, Any] | None = None,
    *,
    named: str = "",
    written_for: str = "pt",
) -> Path:
    """Write the tensors, less those that are tied to another, with config and tokenizer.

    Under a name that transformers does not look for, where the backend's card does not say that it reads this format:
    it knows the words of several quantization_configs without the tensors, and puts random numbers in their place.
    tensors: None is the model's state dict. quantization_config: None is the one of the model's config. named: what
    the files are called, where whether transformers reads them depends on the model: MODEL if it does, OWN_FORMAT
    else. written_for: the framework that their metadata names.
    """
    if tensors is None:
        tensors = dict(loaded.model.state_dict())
    if quantization_config is None:
        quantization_config = dict(loaded.model.config.quantization_config)
    tied = versions.tied_tensors(loaded.model)
    # what is shared may come under one of its names alone, whichever the model has first
    origins = {tied[name]: tensor for name, tensor in tensors.items() if name in tied}
    whole = origins | {name: tensor for name, tensor in tensors.items() if name not in tied}
    kept = {name: tensor.contiguous() for name, tensor in whole.items()}
    readers = loaded._backend.capabilities.readable_by if loaded._backend else ()  # none: a quantize hook made it
    stem = named or (MODEL if "transformers" in readers else OWN_FORMAT)
    save_torch_state_dict(kept, out, filename_pattern=stem + "{suffix}.safetensors", metadata={"format": written_for})
    config = loaded.model.config.__class__.from_dict(loaded.model.config.to_dict())
    config.quantization_config = quantization_config
    config.architectures = [type(loaded.model).__name__]
    config.save_pretrained(out)
    if loaded.model.can_generate():
        loaded.model.generation_config.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    return out

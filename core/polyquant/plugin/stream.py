"""A dense checkpoint as it is quantized: read tensor by tensor, each made into what stays of it, and let go.

Nothing is mapped, so that nothing of the file stays in memory but what the model keeps. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from polyquant.errors import ModelError
from polyquant.models import conversions, versions
from polyquant.models.headers import located_tensors
from polyquant.options import Dtype
from polyquant.plugin.dtypes import cast_dense, dense_dtypes
from polyquant.plugin.layers import assign, fill_empty
from polyquant.plugin.parts import require_finite
from polyquant.plugin.tensors import STORED_ROWS, StoredRows, read_tensor
from polyquant.request import LoadRequest
from polyquant.support import malloc

GIVEN_BACK_BYTES = 2**20
"""After so many bytes of dense tensors freed memory is handed back. Of a dense model of 200 MB, int8 of optimum-quanto
keeps 53 MB; its load added 420 MB to the process without that, and 96 MB with it."""
Pack = Callable[[Any, str], None]
Round = Callable[[Any, StoredRows, torch.dtype], None]
_pack: ContextVar[tuple[Pack, Mapping[str, Round]] | None] = ContextVar("pack", default=None)


@contextmanager
def packing(pack: Pack, tables: Mapping[str, Round] = {}) -> Iterator[None]:
    """Within it `pack` is called with a model and the name of each module of it that was just quantized, or of each
    tensor of experts that the core quantizes; so a layer is not kept as the library has it until all are there.

    tables: names of tensors that the core rounds -> what does so, given the model, the tensor's rows, which are read
    when they are asked for, and their dtype; so the dense tensor is never there whole.
    """
    token = _pack.set((pack, tables))
    try:
        yield
    finally:
        _pack.reset(token)


def packed_at_once(model: Any, name: str) -> None:
    """To be called for each module that has been quantized; see `packing`."""
    if (packs := _pack.get()) is not None:
        packs[0](model, name)


def rounded_tables() -> Mapping[str, Round]:
    """The tensors that the core rounds while they are read; see `packing`."""
    packs = _pack.get()
    return {} if packs is None else packs[1]


def is_streamed(request: LoadRequest) -> bool:
    """Whether a dense checkpoint is read so; one of which a part stays on disk is not."""
    on_disk = "disk" in {str(device) for device in request.device_map.values()}
    return not on_disk and conversions.read_in_turn(request.source, trust_remote_code=request.trust_remote_code)


def quantized_in_turn(
    model: Any, request: LoadRequest, held: Dtype, names: Collection[str], device_map: Mapping[str, Any],
    by_rows: Collection[str] = (),
) -> Iterator[str]:  # fmt: skip
    """Fill `model`, whose parameters are on the meta device; gives each of `names` as soon as its tensors are there.

    held: the dtype in which those are handed over, and in which transformers would load the model. names: of modules,
    or of tensors of experts. device_map: where tensors go. Everything else is in the dtype that it stays in. What is
    tied to a tensor is so when that is there. by_rows: tensors that may stay in the file, as `STORED_ROWS` of their
    modules, until their rows are asked for. Raises ModelError where a tensor of the model is in no file.
    """
    left = dict.fromkeys(names)
    ties = versions.tied_tensors(model)

    def is_dense(name: str) -> bool:
        return name not in left and name.rpartition(".")[0] not in left

    here = {name for name in by_rows if torch.device(_device(name, device_map)).type == "cpu"}
    for name, tensor in dense_tensors(model, request, held, is_dense, by_rows=here):
        if isinstance(tensor, StoredRows):
            setattr(model.get_submodule(name.rpartition(".")[0]), STORED_ROWS, tensor)
        else:
            _put(model, name, tensor, request, device_map, ties)
        del tensor
        for home in (name, name.rpartition(".")[0]):
            if home in left and _is_whole(model, home):
                yield home
                del left[home]
    require_filled(model, request, ties)
    yield from left  # tied to one that came before


def quantized_by_library(
    model: Any, request: LoadRequest, dtype: Dtype, config: Any, rounded: conversions.Rounded | None = None
) -> None:
    """Fill `model`, whose parameters are on the meta device, as a quantizer of transformers' own does on the fly.

    dtype: of what is handed to the quantizer, and of dense tensors. config: transformers' config of the quantizer.
    rounded: does what the quantizer does to a weight, in less memory.
    """
    device_map, ties = dict(request.device_map), versions.tied_tensors(model)
    quantizer = conversions.OnTheFly(model, config, getattr(torch, dtype), device_map, rounded)
    made = set[str]()

    def is_dense(name: str) -> bool:
        return not quantizer.takes(name)

    for name, tensor in dense_tensors(model, request, dtype, is_dense, quantizer.takes):
        assert isinstance(tensor, torch.Tensor)  # nothing is asked for by rows
        home = name.rpartition(".")[0]
        if quantizer.takes(name):
            quantizer.put(name, tensor.to(_device(name, device_map)))
            made.add(home)
        else:
            _put(model, name, tensor, request, device_map, ties)
        del tensor
        if home in made and _is_whole(model, home):
            packed_at_once(model, home)
    require_filled(model, request, ties)
    _move_buffers(model, device_map)
    quantizer.finish()


def dense_tensors(
    model: Any, request: LoadRequest, held: Dtype, is_dense: Callable[[str], bool],
    taken_as_is: Callable[[str], bool] = lambda name: False, by_rows: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor | StoredRows]]:  # fmt: skip
    """(name in the model, tensor) of a dense checkpoint, one after the other, on the CPU; of those of `by_rows` that
    are stored as they are, what reads their rows, which are finite.

    held: the dtype in which transformers would load the model; it has others for some tensors, but for those that
    `taken_as_is` is true of. is_dense: whether a tensor stays dense: it comes in the dtype in which it is kept.
    """
    source, own, wanted = request.source, model.state_dict(), dense_dtypes(request)
    first_dtype, in_float32 = getattr(torch, held), versions.kept_in_float32(model, held)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties, tables, rows_of = versions.tied_tensors(model), rounded_tables(), dict[str, StoredRows]()
    where = {
        key: (source.path / file, *located)
        for file in source.weight_files
        for key, located in located_tensors(source.path / file).items()
    }

    def loaded_in(name: str) -> torch.dtype:
        if in_float32(name):
            return torch.float32
        return first_dtype if taken_as_is(name) else own[name].dtype

    def kept(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A dense tensor as it is kept. Those that the core quantizes later are as transformers loads them."""
        stays = is_dense(name) and name in parameters and name not in request.later and tensor.is_floating_point()
        return cast_dense(source, name, tensor, wanted.get(name, tensor.dtype)) if stays else tensor

    def read(key: str, name: str, alone: bool) -> torch.Tensor:
        path, stored, start = where[key]
        name = ties.get(name, name)
        first = loaded_in(name)

        def cast(piece: torch.Tensor) -> torch.Tensor:
            piece = piece.to(first)
            return kept(name, piece) if alone else piece

        if alone and (name in tables or name in by_rows):
            checked = cast if name in tables else lambda piece: require_finite(cast(piece))
            rows_of[name] = StoredRows(path, key, stored, start, checked)
            return torch.empty(stored.shape, device="meta")
        return read_tensor(path, key, stored, start, cast)

    seen, nbytes = set[str](), 0
    for alias, tensor in conversions.arriving(model, where, read):
        name = ties.get(alias, alias)  # what is shared may be stored under one of its names alone
        nbytes += tensor.nbytes
        rows = rows_of.pop(name, None)
        if name in seen:
            continue
        seen.add(name)
        if rows is None:
            yield name, kept(name, tensor)
        elif name in tables:
            tables[name](model, rows, rows.dtype)
        else:
            yield name, rows
        del tensor
        if nbytes > GIVEN_BACK_BYTES:  # what came of them is there, and what that took is free
            nbytes = 0
            malloc.give_back()


def require_filled(model: Any, request: LoadRequest, ties: Collection[str]) -> None:
    """Raises ModelError where a tensor that is not tied to another is still on the meta device."""
    try:
        fill_empty(model, {}, tied=ties)
    except ModelError as error:
        raise ModelError(f"{request.source.name}: {error}") from error


def _put(
    model: Any, name: str, tensor: torch.Tensor, request: LoadRequest, device_map: Mapping[str, Any],
    ties: Mapping[str, str],
) -> None:  # fmt: skip
    """Put a dense tensor where it belongs, and where what is tied to it does."""
    assign(model, name, tensor.to(_device(name, device_map)))
    if isinstance(put := named(model, name), torch.nn.Parameter):
        put.requires_grad_(put.is_floating_point())  # as transformers has it; libraries' layers differ in their biases
    for tied, origin in ties.items():
        if origin == name:
            owner, _, short = tied.rpartition(".")
            setattr(model.get_submodule(owner), short, named(model, name))
    if name in request.later:
        packed_at_once(model, name)


def named(model: Any, name: str) -> Any:
    """The module of that name, or the tensor of fused experts."""
    owner, _, short = name.rpartition(".")
    return getattr(model.get_submodule(owner), short)


def _is_whole(model: Any, name: str) -> bool:
    """Whether every tensor of a module, or the tensor of that name, is there."""
    one = named(model, name)
    if not isinstance(one, torch.nn.Module):
        return not one.is_meta
    in_file = {"weight"} if STORED_ROWS in vars(one) else set()
    return not any(tensor.is_meta for own, tensor in one.named_parameters(recurse=False) if own not in in_file)


def _device(name: str, device_map: Mapping[str, Any]) -> Any:
    """Of the longest module in the map that the tensor is in."""
    within = [module for module in device_map if not module or name == module or name.startswith(f"{module}.")]
    return device_map[max(within, key=len)]


def _move_buffers(model: Any, device_map: Mapping[str, Any]) -> None:
    """Buffers that no file has, such as rotary frequencies; libraries refuse to have a quantized model moved whole."""
    for name, module in model.named_modules():
        for short, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[short] = buffer.to(_device(f"{name}.{short}", device_map))

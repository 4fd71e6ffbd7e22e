"""The compiled products of `polyquant-kernels`, where it is installed. Imports no torch until one is asked for."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

from polyquant.errors import EnvironmentProblem
from polyquant.types import PackedKind

DISTRIBUTION, INTERFACE = "polyquant-kernels", 8
"""Whose it is, and the interface that is called here: core/kernels/src/polyquant_kernels.h."""
INSTALL, UPDATE = f"pip install {DISTRIBUTION}", f"pip install --upgrade {DISTRIBUTION}"
KINDS: dict[PackedKind, int] = {"affine4": 0, "codebook4": 1, "int8": 2, "float8": 3}
LENT = "POLYQUANT_KERNELS"
"""An environment variable: the folder of the package, for a worker whose own environment need not have it."""
PACKAGE = "polyquant_kernels"
DENSE16 = 4  # weights of 16 bits, as torch has them
SCALES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "float8_e4m3fn": 4}
DIVIDED = 5  # scales of 8 bits that are divided by those of their rows
ACTIVATIONS = {"float32": 0, "int16": 1, "int8": 2}


@cache
def library() -> Any:
    """The package `polyquant_kernels`; None where it is not installed.

    Raises EnvironmentProblem where it is, and cannot be used: of another interface, or not for this machine.
    """
    try:
        found: Any = _package()
    except ImportError:
        return None
    if found.INTERFACE != INTERFACE:
        raise EnvironmentProblem(
            f"{DISTRIBUTION} {found.__version__} has interface {found.INTERFACE}, and {INTERFACE} is called here: "
            f"{UPDATE}"
        )
    try:
        found.library()
    except OSError as error:
        raise EnvironmentProblem(
            f"{DISTRIBUTION} cannot be loaded ({error}); {UPDATE}, or take it out and plain torch multiplies"
        ) from error
    return found


def _package() -> ModuleType:
    """The package, from where it is lent, else as it is installed. Raises ImportError where there is none."""
    folder = os.environ.get(LENT)
    if not folder or PACKAGE in sys.modules:
        return import_module(PACKAGE)
    spec = util.spec_from_file_location(PACKAGE, Path(folder) / "__init__.py", submodule_search_locations=[folder])
    if spec is None or spec.loader is None:
        raise ImportError(f"{LENT} is {folder}, which holds no package")
    sys.modules[PACKAGE] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lent() -> dict[str, str]:
    """The environment variables with which a worker uses the package of this environment."""
    spec = util.find_spec(PACKAGE)
    return {} if spec is None or spec.origin is None else {LENT: str(Path(spec.origin).parent)}


@cache
def functions() -> Any:
    """The compiled functions, which run in torch's own threads where these can be lent."""
    import torch

    found = library()
    found.borrow_threads(ctypes.CDLL(torch._C.__file__))
    return found.library()


def set_in_use() -> str:
    """The instructions that are used: `avx2`; empty where there are no kernels."""
    found = library()
    return str(found.library().pq_in_use().decode()) if found else ""


def name() -> str:
    """What multiplies with packed weights here: `packed (avx2)`, or `packed (plain torch)`."""
    return f"packed ({set_in_use() or 'plain torch'})"


def told() -> str:
    """What the doctor says of them: which are used, or what is lost without them and how to get them."""
    try:
        found = library()
    except EnvironmentProblem as problem:
        return f"packed kernels: {problem}"
    if found is None:
        return f"packed kernels: not installed, so kernel='packed' multiplies in plain torch, slowly: {INSTALL}"
    return f"packed kernels: {DISTRIBUTION} {found.__version__}, {set_in_use()}"


def type_number(dtype: Any) -> int | None:
    """The number of a dtype of activations; None for one that the kernels do not take."""
    import torch

    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}.get(dtype)


def weight_struct(packed: Any) -> ctypes.Structure:
    """A `PackedWeight` as the kernels take it: it points into the tensors, which must stay."""
    rows, columns = packed.padded
    address = {name: part.data_ptr() for name, part in packed.parts.items()}
    scale_type = DIVIDED if packed.format.row_scales == "divide" else SCALES[packed.format.scale_dtype]
    struct: ctypes.Structure = library().Weight(
        **address, rows=rows, columns=columns, group=packed.group, outer_group=packed.format.outer_group,
        kind=KINDS[packed.format.kind], scale_type=scale_type, zero=packed.zero,
    )  # fmt: skip
    return struct


def dense_struct(weight: Any, rows: int) -> ctypes.Structure:
    """The first rows of a contiguous tensor (rows, columns) of 16 bits as the kernels take it, which must stay.

    rows: a multiple of 8; columns are one of 32.
    """
    columns, dtype = weight.shape[1], str(weight.dtype).removeprefix("torch.")
    struct: ctypes.Structure = library().Weight(
        codes=weight.data_ptr(), rows=rows, columns=columns, group=columns, kind=DENSE16, scale_type=SCALES[dtype]
    )
    return struct


def address_of(struct: ctypes.Structure) -> Any:
    """As the kernels' functions take a structure."""
    return ctypes.byref(struct)


def require(status: int) -> None:
    """Raises what a status of the kernels means."""
    if status == -2:
        raise MemoryError("there is no memory for a product of packed weights")
    if status:
        raise ValueError(f"the kernels refused a product of packed weights ({status})")

"""Products of packed weights, compiled: the library, its structures, and what it may answer. Imports no torch.

One shared library, called through its C interface (src/polyquant_kernels.h), serves every Python and every torch; it
chooses among the instruction sets that it holds when it is loaded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__version__ = "0.1.0"
INTERFACE = 8
"""Of src/polyquant_kernels.h: the library of another number is not called."""
FLOAT32, FLOAT16, BFLOAT16, NESTED, E4M3, E4M3_DIVIDED = range(6)
AFFINE4, CODEBOOK4, INT8, FLOAT8, DENSE16 = range(5)
EXACT, INT16, INT8_ACTIVATIONS = range(3)
SILU, GELU_TANH = range(2)
ANSWERS = {-1: "there is no product for what was asked", -2: "there is no memory for it"}


class Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "codes", "scales", "zeros", "minima", "table", "order", "column_scales", "outer_scales", "outer_minima",
            "row_scales")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "outer_group")),
        ("kind", ctypes.c_int32), ("scale_type", ctypes.c_int32), ("zero", ctypes.c_float),
    ]  # fmt: skip


class Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("extra", ctypes.c_float)]


class OptionalNorm(ctypes.Structure):
    _fields_ = [("norm", Norm), ("skip", ctypes.c_int32)]


class Product(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, OptionalNorm) for name in (
            "before_attention", "query_norm", "key_norm", "after_attention", "before_mlp", "after_mlp")),
        *((name, Product) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("sinks", ctypes.c_void_p), ("window", ctypes.c_int64), ("rotation", ctypes.c_int32),
    ]  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_int64) for name in ("layer_count", "hidden", "heads", "key_heads", "width", "rotated")),
        *((name, ctypes.c_float) for name in ("attention_scale", "attention_cap", "residual_scale")),
        ("activation", ctypes.c_int32), ("whole_norms", ctypes.c_int32), ("last", Norm),
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("room", "held")),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The library, its functions with their types. Raises OSError where there is none for this machine."""
    names = ("libpolyquant_kernels.so", "libpolyquant_kernels.dylib", "libpolyquant_kernels.dll")
    found = next((path for name in names if (path := Path(__file__).parent / name).exists()), None)
    if found is None:
        raise OSError(f"{Path(__file__).parent} holds no library; install polyquant-kernels anew")
    loaded = ctypes.CDLL(str(found))
    for name in ("pq_interface", "pq_use", "pq_linear", "pq_decode", "pq_rows", "pq_step"):
        getattr(loaded, name).restype = ctypes.c_int32
    for name in ("pq_available", "pq_in_use"):
        getattr(loaded, name).restype = ctypes.c_char_p
    address, count, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.pq_use.argtypes = [ctypes.c_char_p]
    loaded.pq_linear.argtypes = [address, address, word, count, address, word, address, word, word]
    loaded.pq_decode.argtypes = [address, count, count, address, word, word]
    loaded.pq_rows.argtypes = [address, address, count, address, word]
    loaded.pq_step.argtypes = [address, address, address, count, count, address, address, word, word]
    loaded.pq_borrow.argtypes, loaded.pq_borrow.restype = [address], None
    if (other := loaded.pq_interface()) != INTERFACE:
        raise OSError(f"{found} has interface {other}, and {INTERFACE} is called; install polyquant-kernels anew")
    return loaded


def borrow_threads(owner: ctypes.CDLL | None) -> bool:
    """Let products run in the threads of OpenMP as `owner`, a library that uses it, has it; None: in own ones again.

    Two pools, each awake for the next work, would take each other's cores: 1.5 times the time of a step on two. Whether
    it has an OpenMP whose threads can be lent (libgomp's interface, which LLVM's has too).
    """
    lent = None if owner is None else getattr(owner, "GOMP_parallel", None)
    library().pq_borrow(ctypes.cast(lent, ctypes.c_void_p) if lent else None)
    return lent is not None


def available() -> list[str]:
    """The instruction sets that this processor runs, best first."""
    return library().pq_available().decode().split()

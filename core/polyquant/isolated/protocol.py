"""What this process and a worker say to each other over two pipes: a line of JSON, and after it, where the line says
so, one tensor as safetensors bytes. Nothing is ever executed or unpickled; sizes are bounded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from polyquant.types import UNREADABLE

Kept = TypeVar("Kept")
VERSION = 2
LINE_BYTES = 2**26  # of a line at most: layers of a large model, calibration text
TENSOR_BYTES = 2**32  # of a tensor at most: the logits of 8192 tokens over a vocabulary of 128 Ki
HEADER_BYTES = 2**16


class ProtocolError(Exception):
    """The other side's words are none of this protocol: cut short, too large, or no JSON."""


def send(pipe: int, message: Mapping[str, Any], tensor: Any = None) -> None:
    """Write a message, and a torch tensor with it. Raises ProtocolError for what is too large; OSError."""
    header, content = (b"", memoryview(b"")) if tensor is None else _pack(tensor)
    nbytes = len(header) + content.nbytes
    whole = message if tensor is None else {**message, "tensor_bytes": nbytes}
    line = msgspec.json.encode(whole, enc_hook=_plain) + b"\n"
    if len(line) > LINE_BYTES or nbytes > TENSOR_BYTES:
        raise ProtocolError(f"a message of {max(len(line), nbytes)} bytes; at most {LINE_BYTES} go in a line, and "
                            f"{TENSOR_BYTES} in a tensor")  # fmt: skip
    for part in (memoryview(line), memoryview(header), content):
        _write(pipe, part)


def _write(pipe: int, content: memoryview) -> None:
    while content.nbytes:
        content = content[os.write(pipe, content) :]


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], Any]:
    """The next message and its tensor, or None. Raises EOFError where there is none more, else ProtocolError."""
    line = pipe.readline(LINE_BYTES + 1)
    if not line:
        raise EOFError
    if not line.endswith(b"\n"):
        what = "is longer than" if len(line) > LINE_BYTES else "was cut short, and may have"
        raise ProtocolError(f"a message {what} {LINE_BYTES} bytes")
    try:
        message = msgspec.json.decode(line, type=dict[str, Any])
        nbytes = msgspec.convert(message.pop("tensor_bytes", None), int | None)
    except (msgspec.ValidationError, *UNREADABLE) as error:
        raise ProtocolError(f"a message is no JSON object ({error}): {line[:100]!r}") from error
    return message, None if nbytes is None else _unpack(pipe, nbytes)


def record(kind: type[Kept], value: Any) -> Kept:
    """A record from what JSON has of it. Raises msgspec.ValidationError."""
    return msgspec.convert(value, kind, dec_hook=lambda wanted, found: wanted(found))


def _plain(value: object) -> str:
    """Paths as text."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _names() -> dict[str, Any]:
    """safetensors' name of a dtype -> torch's."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _pack(tensor: Any) -> tuple[bytes, memoryview]:
    """Header and content of a safetensors file of one tensor, without a copy of it."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = next(name for name, dtype in _names().items() if dtype == tensor.dtype)
    entry = {"tensor": {"dtype": name, "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}}
    header = msgspec.json.encode(entry)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _unpack(pipe: IO[bytes], nbytes: int) -> Any:
    """The tensor of the next `nbytes`, read into its own memory."""
    import torch

    if not 8 < nbytes <= TENSOR_BYTES:
        raise ProtocolError(f"a tensor of {nbytes} bytes; at most {TENSOR_BYTES} are taken")
    length = int.from_bytes(_exactly(pipe, 8), "little")
    if not 0 < length <= min(HEADER_BYTES, nbytes - 8):
        raise ProtocolError(f"a tensor whose header has {length} of {nbytes} bytes")
    try:
        entry = msgspec.json.decode(_exactly(pipe, length), type=dict[str, dict[str, Any]])["tensor"]
        dtype, shape = _names()[entry["dtype"]], msgspec.convert(entry["shape"], list[int])
        content = torch.empty(nbytes - 8 - length, dtype=torch.uint8)
        _read_into(pipe, memoryview(content.numpy()))
        return content.view(dtype).reshape(shape)
    except (KeyError, RuntimeError, msgspec.ValidationError, *UNREADABLE) as error:
        raise ProtocolError(f"a tensor that is none: {type(error).__name__}: {error}") from error


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    content = bytearray(count)
    _read_into(pipe, memoryview(content))
    return bytes(content)


def _read_into(pipe: IO[bytes], place: memoryview) -> None:
    filled = 0
    while filled < place.nbytes and (count := pipe.readinto(place[filled:])):  # type: ignore[attr-defined]
        filled += count
    if filled < place.nbytes:
        raise ProtocolError(f"a tensor was cut short: {filled} of {place.nbytes} bytes came")

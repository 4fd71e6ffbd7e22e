"""What a backend's `load` is asked for: the model's files, and everything the core has resolved about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from polyquant.types import DeviceMap, Record, WeightInfo

Offload = Literal["error", "cpu", "disk"]
"""What may happen to a part of a model for which `device` has no room. error: nothing, the load is refused. cpu: it
goes to the CPU. disk, on a CPU: packed blocks stay in a file of the cache, and are read for each token."""
KvCache = Literal["keep", "int8", "int4"]
"""Keys and values between tokens. keep: as the model computes them. int8, int4: codes with a scale and a minimum for
each 64 of a head, and the newest tokens in full."""
MaxMemory = Mapping[int | str, int | str]
"""Device -> bytes or '6GiB', as accelerate takes it."""


class ModelSource(Record, frozen=True):
    """A model on this machine's disk, checked."""

    name: str  # as the user gave it
    path: Path  # the folder with config.json, or with the GGUF file
    gguf_file: str = ""  # the file's name inside `path`, where the weights are a GGUF
    config: Mapping[str, Any] = {}  # config.json as it stands; empty for a GGUF
    weight_files: tuple[str, ...] = ()  # names inside `path`
    packaged: bool = False  # a dense model that a package brings as a GGUF: it stands for the dense one

    @property
    def files(self) -> tuple[Path, ...]:
        """The folder, and the weight files in it, which may be links."""
        return (self.path, *(self.path / name for name in self.weight_files))

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum((self.path / name).stat().st_size for name in self.weight_files)

    @property
    def stored_quantization(self) -> dict[str, Any]:
        """The checkpoint's own quantization config; empty for a dense one."""
        text_config = self.config.get("text_config") or {}
        stored = self.config.get("quantization_config") or text_config.get("quantization_config")
        return dict(stored) if stored else {}


class LoadRequest(Record, frozen=True):
    """A load, with every question settled except the backend's own."""

    source: ModelSource
    device: str  # where the model runs, such as cpu or cuda:0
    device_map: DeviceMap  # module name -> device; {"": device} where all of it goes to one
    weights: tuple[WeightInfo, ...] = ()  # the model's tensors by its architecture, dense ones in the compute dtype
    later: frozenset[str] = frozenset()  # of those, fused experts that the core quantizes after the load, if it may
    names: Mapping[str, str] = {}  # of stored tensors -> in the model, where transformers renames them
    offload: Offload = "error"  # what may happen where the model does not fit `device`
    on_disk: tuple[str, ...] = ()  # blocks, such as model.layers.7, whose packed weights are read for each token
    allow_dequantize: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attention: str = ""  # transformers' attn_implementation; empty: its own choice
    kv_cache: KvCache = "keep"
    emulate_activations: bool = False  # round the inputs of layers after the load, as the format's kernels do
    progress: bool = False  # whether progress bars may be drawn

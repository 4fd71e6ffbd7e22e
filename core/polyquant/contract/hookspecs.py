"""The hook specification: what a backend plugin answers. Docstrings only; see docs/authors for a walk through.

`backend_info` is the one broadcast. Every other hook has one addressee: the registry calls exactly the plugin
that is registered under the backend's name, so no implementation ever compares names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyquant.contract.markers import hookspec
from polyquant.types import BackendInfo, LayerInfo, LayerPlan, Problem, WeightInfo

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel
    from polyquant.options import BackendOptions
    from polyquant.packed_weights.codes import WeightCodes
    from polyquant.packed_weights.weight import PackedWeight
    from polyquant.request import LoadRequest

VERSION = 1
"""Of the specification. It grows when a hook loses an argument, is renamed or removed; what is added changes nothing
for a plugin that does not ask for it (docs/authors says how)."""
REMOVED: Mapping[str, Mapping[str, str]] = {}
"""hook -> argument that earlier versions gave -> what to use instead."""
REQUIRED = ("backend_info", "validate_environment", "build_config", "load", "describe_layers")
OPTIONAL = (
    "plan_layers", "quantize", "prepare_for_training", "save", "pack", "quantize_linear", "unpack", "write_unpacked",
)  # fmt: skip


class QuantBackend:
    """Hooks of a quantization backend. The first five are required."""

    @hookspec
    def backend_info(self) -> BackendInfo:
        """The backend's card: name, capabilities, options type, libraries. Must not import torch."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def validate_environment(self, device: str) -> list[Problem]:
        """Everything that stops the backend on this machine, all at once; empty where it can run.

        device: a torch device such as `cpu` or `cuda:0`; a name torch does not know is a problem too.
        Never raises for a missing library, never prints, never changes anything.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def build_config(self, options: Mapping[str, object]) -> BackendOptions:
        """The options as the backend's typed, frozen, strict record.

        Raises ConfigError, with the allowed values, before any file is read.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def load(self, request: LoadRequest, config: BackendOptions) -> LoadedModel:
        """The model in eval mode, the effective config and the kernel in use.

        The core has resolved everything in `request` and `config` (device map, compute dtype, skipped modules, the
        model's tensors by shape), has run `validate_environment`, and finishes what is returned: the tokenizer where
        none is given, and the stored options where the model's config has none.
        Must not return a dense model unless `request.allow_dequantize`.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        """Every parameter and buffer once: bytes by storage, bits, scheme, kernel, or the reason it is dense."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def plan_layers(self, weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]:
        """Predicted bytes of each tensor, from shapes alone; one plan for each of `weights`, in their order."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def quantize(self, request: LoadRequest, config: BackendOptions, calibration: Sequence[str], out: Path) -> Path:
        """Quantize a dense model with calibration texts and write a checkpoint into the empty folder `out`."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        """The model, ready for PEFT adapters on its frozen quantized base."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        """Write a checkpoint into the empty folder `out`; it loads back bit for bit. The core makes it atomic."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def pack(self, module: Any) -> PackedWeight:
        """The weight of a quantized linear layer or embedding in polyquant's packed layout, nothing rounded.

        Asked with the option kernel="packed", of each module whose plan says which layout its weight has there
        (`LayerPlan.packed`), as `load` made it. The core puts its own layer in the module's place, with the same bias,
        and in that of a head that is tied to an embedding.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def quantize_linear(self, linear: Any, config: BackendOptions) -> Any:
        """A plain `torch.nn.Linear` without a bias, as `load` quantizes one on the fly: the module that `pack` takes.

        For matrices that the library does not take itself: each expert of a fused tensor, one after the other. The
        backend's options derive from `ExpertsOptions`; `config` is as `load` got it, the weight in the compute dtype.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def unpack(self, weight: WeightCodes, config: BackendOptions) -> dict[str, Any]:
        """The twin of `pack`: the tensors of a linear layer under the format's names in it, as a checkpoint holds them.

        config: what its `holding` answered for all weights, with what the user gave. Codes stay what they are; scales
        may be rounded to a dtype of the format's (`WeightCodes.scales_as`), which the core measures and states. Without
        the bias.
        Raises Misfit, which names the property, where the format has no place for the weight with these options.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def write_unpacked(self, loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, Any]]], out: Path) -> Path:
        """Write a checkpoint of converted layers into the empty folder `out`: for formats that need more than tensors.

        Without this hook the core writes safetensors under the layers' names, and `to_stored()` in config.json.
        loaded: the model, dense but for the layers, with the options to be written; layers: the name of a module, and
        what `unpack` gave for it, one after the other; a bias is in the module. Of options with `takes_experts` fused
        experts too: the name of their tensor, and what `unpack` gave of each, stacked along a new first axis.
        """
        raise NotImplementedError

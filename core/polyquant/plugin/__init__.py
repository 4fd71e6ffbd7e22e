"""What a backend plugin is written with: it imports this package, `polyquant.errors`, and in tests `polyquant.testing`.

Here are the light names, for `plugin.py`, `options.py` and `planning.py`: importing them imports no torch. The modules
beside are for files whose names begin with an underscore: `checkpoints` (reading and writing them), `layers` (quantized
modules, their products and gradients), `experts` (those that are stored one by one), `calibration`, `process` (work in
a process of its own), and light ones for the formats that several libraries share: `layouts` (GPTQ, AWQ) and `gguf`.
"""

from polyquant import activations as activation_formats
from polyquant.activations import Activations
from polyquant.contract.markers import hookimpl
from polyquant.loaded import LoadedModel, Prompt
from polyquant.measure.speed import Feed
from polyquant.memory.experts import one_expert
from polyquant.memory.planned import (
    dense_linears,
    is_linear,
    plan_dense,
    plan_linears,
    refuse_experts,
)
from polyquant.mixing import LayerFormats, MixableOptions
from polyquant.models.prompts import encode_prompt
from polyquant.models.roles import REASONS, TIED
from polyquant.models.structured import Fitting, Schema, fitting
from polyquant.models.tokens import LEAST_LOGPROB, Decoder, Token, Tokens, likeliest
from polyquant.modules import module_of
from polyquant.options import BackendOptions, Dtype, NumberFormat, RoundingMethod, convert, resolved_dtype
from polyquant.packable import ExpertsOptions, PackableOptions, is_packed
from polyquant.packed_weights.format import E2M1, group_of_runs
from polyquant.plugin.backend import PluginBackend
from polyquant.plugin.planning import quantized_modules, repacked_modules, unfit
from polyquant.plugin.settings import require_read, usual_options
from polyquant.request import LoadRequest, ModelSource
from polyquant.support.devices import device_problems
from polyquant.support.libraries import contained, import_problems, library_problems, require_library
from polyquant.types import (
    DTYPE_BYTES,
    BackendInfo,
    Capabilities,
    DeviceMap,
    DeviceSupport,
    HeldWeight,
    Isolated,
    LayerInfo,
    LayerPlan,
    Library,
    Mark,
    PackedFormat,
    Problem,
    Role,
    WeightInfo,
)

__all__ = [
    "DTYPE_BYTES",
    "E2M1",
    "LEAST_LOGPROB",
    "REASONS",
    "TIED",
    "Activations",
    "BackendInfo",
    "BackendOptions",
    "Capabilities",
    "Decoder",
    "DeviceMap",
    "DeviceSupport",
    "Dtype",
    "ExpertsOptions",
    "Feed",
    "Fitting",
    "HeldWeight",
    "Isolated",
    "LayerFormats",
    "LayerInfo",
    "LayerPlan",
    "Library",
    "LoadRequest",
    "LoadedModel",
    "Mark",
    "MixableOptions",
    "ModelSource",
    "NumberFormat",
    "PackableOptions",
    "PackedFormat",
    "PluginBackend",
    "Problem",
    "Prompt",
    "Role",
    "RoundingMethod",
    "Schema",
    "Token",
    "Tokens",
    "WeightInfo",
    "activation_formats",
    "contained",
    "convert",
    "dense_linears",
    "device_problems",
    "encode_prompt",
    "fitting",
    "group_of_runs",
    "hookimpl",
    "import_problems",
    "is_linear",
    "is_packed",
    "library_problems",
    "likeliest",
    "module_of",
    "one_expert",
    "plan_dense",
    "plan_linears",
    "quantized_modules",
    "refuse_experts",
    "repacked_modules",
    "require_library",
    "require_read",
    "resolved_dtype",
    "unfit",
    "usual_options",
]

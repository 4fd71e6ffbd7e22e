"""Copies of the rowwise backend, each with one promise broken: what the conformance suite must find.

And variants that break none, to see that the suite asks of a backend only what it declares.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import fields, replace

import msgspec
from polyquant.errors import ConfigError, ModelError
from polyquant.plugin import BackendOptions, LoadedModel, PluginBackend, convert, hookimpl
from polyquant_rowwise.options import RowwiseOptions
from polyquant_rowwise.plugin import INFO
from polyquant_rowwise.plugin import backend as rowwise

PLUGINS = {}  # name of the backend -> value of its entry point
COUNT = itertools.count(1)
BREAKS = {}  # name of the backend -> the check that must fail


class Variant(PluginBackend):
    """rowwise under another name; what a subclass overrides, it has from `rowwise`, the object that is copied."""

    name = ""
    options = RowwiseOptions
    card = {}
    capabilities = {}
    hooks = ("plan_layers", "save", "prepare_for_training")

    def __init__(self):
        capabilities = msgspec.structs.replace(INFO.capabilities, **self.capabilities)
        changes = {"name": self.name, "options": self.options, "capabilities": capabilities, **self.card}
        info = msgspec.structs.replace(INFO, presets={"int8": {"bits": 8}}, **changes)
        super().__init__(info, self.hooks, package=rowwise.package)


class CalibratedOptions(RowwiseOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    @property
    def rounding_method(self):
        return "calibrated"


def plugin(breaks=""):
    def register(cls):
        cls.name = f"rowwise-{cls.__name__.lower()}"
        cls.plugin = cls()
        PLUGINS[cls.name] = f"rowwise_mutants:{cls.__name__}.plugin"
        if breaks:
            BREAKS[cls.name] = breaks
        return cls

    return register


def become(cls, loaded):
    """`loaded` as an object of a subclass of LoadedModel."""
    return cls(**{field.name: getattr(loaded, field.name) for field in fields(LoadedModel)})


def redescribe(change, layers):
    """The layers, those that `change` answers for replaced."""
    return [msgspec.structs.replace(layer, **(change(layer) or {})) for layer in layers]


def quantized(model):
    """The quantized layers of a model."""
    return [module for module in model.modules() if "scale" in module._buffers]


# the card, the hooks, the environment


@plugin(breaks="imports_nothing_heavy")
class Heavy(Variant):
    @hookimpl
    def backend_info(self):
        import torch  # noqa: F401

        return super().backend_info()


@plugin(breaks="card_is_complete")
class Undocumented(Variant):
    card = {"docs": "see the readme"}


@plugin(breaks="capabilities_have_their_hooks")
class Modest(Variant):
    capabilities = {"trains": False}


@plugin(breaks="others_read_it_right_or_refuse_it")
class Boasts(Variant):
    capabilities = {"readable_by": ("transformers",)}


@plugin(breaks="what_is_declared_loads")
class Promises(Variant):
    capabilities = {"bits": (*INFO.capabilities.bits, 5)}


@plugin(breaks="hooks_fit_the_specification")
class Defaults(Variant):
    @hookimpl
    def plan_layers(self, weights, config, verbose=False):
        return rowwise.plan_layers(weights, config)


@plugin(breaks="no_device_is_a_problem")
class Raises(Variant):
    @hookimpl
    def validate_environment(self, device):
        if device == "nonsense":
            raise RuntimeError(device)
        return super().validate_environment(device)


@plugin(breaks="environment_check_is_quiet")
class Prints(Variant):
    @hookimpl
    def validate_environment(self, device):
        print("checking", device)
        return super().validate_environment(device)


# options


@plugin(breaks="unknown_options_are_refused")
class Tolerant(Variant):
    @hookimpl
    def build_config(self, options):
        known = RowwiseOptions.__struct_fields__
        return convert(RowwiseOptions, {name: value for name, value in options.items() if name in known})


@plugin(breaks="wrong_values_are_refused")
class Guesses(Variant):
    @hookimpl
    def build_config(self, options):
        try:
            return convert(RowwiseOptions, options)
        except ConfigError as error:
            if "must be" in str(error):
                return RowwiseOptions()
            raise


class LooseOptions(RowwiseOptions, frozen=False, kw_only=True, forbid_unknown_fields=True):
    pass


@plugin(breaks="options_are_frozen")
class Loose(Variant):
    options = LooseOptions


@plugin(breaks="options_survive_conversion")
class Changes(Variant):
    @hookimpl
    def build_config(self, options):
        config = super().build_config(options)
        return msgspec.structs.replace(config, scale_dtype="bfloat16") if "scale_dtype" in options else config


@plugin(breaks="a_skip_pattern_without_a_match_is_refused")
class Forgiving(Variant):
    @hookimpl
    def build_config(self, options):
        config = super().build_config(options)
        return msgspec.structs.replace(config, skip=tuple(name for name in config.skip if "layers" in name))


class FreeOptions(RowwiseOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    load_time = frozenset(BackendOptions.__struct_fields__)


@plugin(breaks="contradicting_options_are_refused")
class Agrees(Variant):
    options = FreeOptions


# loading


class Loads(Variant):
    """Changes what was loaded."""

    def after(self, loaded):
        raise NotImplementedError

    @hookimpl
    def load(self, request, config):
        loaded = rowwise.load(request, config)
        return self.after(loaded) or loaded


@plugin(breaks="loads")
class Nameless(Loads):
    def after(self, loaded):
        loaded.kernel = ""


@plugin(breaks="is_in_eval_mode")
class Training(Loads):
    def after(self, loaded):
        loaded.model.model.norm.train()


@plugin(breaks="config_is_the_effective_one")
class Otherwise(Loads):
    def after(self, loaded):
        loaded.model.config.quantization_config = {**loaded.config.to_stored(), "scale_dtype": "bfloat16"}


@plugin(breaks="runs_on_every_declared_device")
class Elsewhere(Variant):
    @hookimpl
    def describe_layers(self, model):
        return redescribe(
            lambda layer: {"device": "meta"} if layer.role == "vector" else None, rowwise.describe_layers(model)
        )


class Packs(Variant):
    hooks = (*Variant.hooks, "pack", "quantize_linear")


@plugin(breaks="packed_weights_are_the_librarys")
class Shifted(Packs):
    @hookimpl
    def pack(self, module):
        weight = rowwise.pack(module)
        return replace(weight, scales=weight.scales * 1.01)


@plugin(breaks="packed_layers_train")
class Stiff(Packs):
    """Lets no gradient through where the core's layers are to take its own's place."""

    @hookimpl
    def load(self, request, config):
        loaded = rowwise.load(request, config)
        if config.kernel == "packed":
            layer = loaded.model.model.layers[1]
            layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
        return loaded


@plugin(breaks="packed_models_save_what_the_library_does")
class Moody(Packs):
    """Packs a little otherwise each time."""

    @hookimpl
    def pack(self, module):
        weight = rowwise.pack(module)
        return replace(weight, scales=weight.scales * (1 + 1e-6 * next(COUNT)))


@plugin(breaks="converted_layers_are_the_same")
class Mislabels(Packs):
    """Writes other scales than it was given."""

    hooks = (*Packs.hooks, "unpack")

    @hookimpl
    def unpack(self, weight, config):
        tensors = rowwise.unpack(weight, config)
        return tensors | {"scale": tensors["scale"] * 1.01}


@plugin(breaks="load_leaves_global_state_alone")
class Leaks(Loads):
    def after(self, loaded):
        os.environ["ROWWISE_WAS_HERE"] = "1"


@plugin(breaks="memory_comes_back")
class Keeps(Loads):
    kept = []

    def after(self, loaded):
        self.kept[:] = [loaded.model]


# outputs


class Squeezed(LoadedModel):
    def logits(self, tokens):
        return super().logits(tokens).squeeze(0)


@plugin(breaks="logits_are_whole")
class Squeezes(Loads):
    def after(self, loaded):
        return become(Squeezed, loaded)


class Restless(LoadedModel):
    count = itertools.count()

    def stream(self, prompt, **generation_parameters):
        return itertools.chain(super().stream(prompt, **generation_parameters), [str(next(self.count))])


@plugin(breaks="greedy_decoding_is_deterministic")
class Wavers(Loads):
    def after(self, loaded):
        return become(Restless, loaded)


@plugin(breaks="stays_close_to_the_dense_model")
class Coarse(Loads):
    def after(self, loaded):
        for layer in loaded.model.model.layers:
            if hasattr(layer.mlp.up_proj, "scale"):
                layer.mlp.up_proj.weight.div_(24, rounding_mode="trunc").mul_(24)


@plugin(breaks="compiles_with_torch")
class Compiled(Loads):
    capabilities = {"compiles": True}

    def after(self, loaded):
        import torch

        def halve(module, given, logits):
            return logits / 2 if torch.compiler.is_compiling() else logits

        loaded.model.lm_head.register_forward_hook(halve)


@plugin(breaks="offloads_to_the_cpu")
class Stays(Loads):
    capabilities = {"offloads": True}


# layers and bytes


@plugin(breaks="describes_every_tensor_once")
class Twice(Variant):
    @hookimpl
    def describe_layers(self, model):
        layers = rowwise.describe_layers(model)
        norm = next(layer for layer in layers if layer.role == "vector")
        return [*layers, msgspec.structs.replace(norm, stored_bytes=0, parts={})]


@plugin(breaks="bits_and_schemes_are_declared")
class Renames(Variant):
    @staticmethod
    def renamed(layer):
        return {"scheme": "int8"} if layer.quantized and "q_proj" in layer.name else None

    @hookimpl
    def describe_layers(self, model):
        return redescribe(self.renamed, rowwise.describe_layers(model))

    @hookimpl
    def plan_layers(self, weights, config):
        return redescribe(self.renamed, rowwise.plan_layers(weights, config))


@plugin(breaks="dense_tensors_have_reasons")
class Silent(Variant):
    @hookimpl
    def describe_layers(self, model):
        return redescribe(
            lambda layer: {"reason": ""} if layer.role == "vector" else None, rowwise.describe_layers(model)
        )


@plugin(breaks="covers_the_model")
class Half(Loads):
    capabilities = {"saves": False}
    hooks = ("plan_layers", "prepare_for_training")

    def after(self, loaded):
        import torch

        for name, module in list(loaded.model.model.layers[1].named_modules()):
            if hasattr(module, "scale"):
                dense = torch.nn.Linear(module.in_features, module.out_features, bias=False).eval()
                dense.weight.data = module.weight * module.scale
                loaded.model.model.layers[1].set_submodule(name, dense)

    @hookimpl
    def plan_layers(self, weights, config):
        names = {weight.name.rpartition(".")[0] for weight in weights if ".layers.1." in weight.name}
        names |= {weight.name.rpartition(".")[0] for weight in weights if weight.default_skip}
        return rowwise.plan_layers(weights, msgspec.structs.replace(config, skip=(*config.skip, *names)))


@plugin(breaks="skipped_modules_stay_dense")
class Deaf(Variant):
    @hookimpl
    def load(self, request, config):
        if request.source.stored_quantization:
            return rowwise.load(request, config)
        return rowwise.load(request, msgspec.structs.replace(config, skip=(), skip_defaults=True))


@plugin(breaks="described_bytes_are_stored_bytes")
class Understates(Variant):
    @hookimpl
    def describe_layers(self, model):
        """As transformers' footprint counts: the scales are left out."""

        def change(layer):
            packed = layer.parts.get("weight", 0)
            return {"parts": {"weight": packed}, "stored_bytes": packed} if layer.quantized else None

        return redescribe(change, rowwise.describe_layers(model))


@plugin(breaks="plan_is_within_one_percent")
class Optimist(Variant):
    @hookimpl
    def plan_layers(self, weights, config):
        plans = rowwise.plan_layers(weights, config)
        return [msgspec.structs.replace(plan, stored_bytes=plan.stored_bytes // (1 + plan.quantized)) for plan in plans]


# files and training


@plugin(breaks="saves_and_loads_back")
class Inexact(Variant):
    @hookimpl
    def save(self, loaded, out):
        from safetensors.torch import load_file, save_file

        rowwise.save(loaded, out)
        (path,) = out.glob("*.safetensors")
        tensors = load_file(path)
        rounded = {name: tensor.bfloat16().float() if "embed" in name else tensor for name, tensor in tensors.items()}
        save_file(rounded, path, metadata={"format": "pt"})
        return out


@plugin(breaks="wrong_tensors_are_refused")
class Blames(Variant):
    """What does not fit is a failure of the backend's, as where a library's error comes through."""

    @hookimpl
    def load(self, request, config):
        try:
            return rowwise.load(request, config)
        except ModelError as error:
            raise ValueError("shape '[256, 128]' is invalid for input of size 32767") from error


@plugin(breaks="writes_no_pickle")
class Pickles(Variant):
    @hookimpl
    def save(self, loaded, out):
        import torch

        torch.save({}, out / "training_args.bin")
        return rowwise.save(loaded, out)


@plugin(breaks="adapters_train_on_the_frozen_base")
class Detached(Variant):
    @hookimpl
    def prepare_for_training(self, loaded):
        model = rowwise.prepare_for_training(loaded)
        model.model.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
        return model


@plugin(breaks="a_second_adapter_trains")
class Tires(Variant):
    """Passes gradients in the first training step of a layer only."""

    @hookimpl
    def prepare_for_training(self, loaded):
        model = rowwise.prepare_for_training(loaded)
        for layer in quantized(model):
            layer.passes = 0
            layer.register_forward_pre_hook(_tire)
        return model


def _tire(layer, inputs):
    layer.passes += inputs[0].requires_grad
    return (inputs[0].detach() if layer.passes > 4 else inputs[0], *inputs[1:])


@plugin(breaks="adapters_merge_or_are_refused")
class ThinAir(Variant):
    """Shows a dense weight, made when it is asked for: what PEFT adds to it is gone."""

    @hookimpl
    def prepare_for_training(self, loaded):
        model = rowwise.prepare_for_training(loaded)
        del model._polyquant
        for layer in quantized(model):
            layer.__class__ = _showing_dense(type(layer))
        return model


@plugin(breaks="dora_trains_or_is_refused")
class Spent(Variant):
    """Shows the dense weight until the first pass with gradients."""

    @hookimpl
    def prepare_for_training(self, loaded):
        model = rowwise.prepare_for_training(loaded)
        for layer in quantized(model):
            layer.spent = False
            layer.register_forward_pre_hook(_spend)
            layer.__class__ = _showing_dense(type(layer))
        return model


def _spend(layer, inputs):
    layer.spent = layer.spent or inputs[0].requires_grad


def _showing_dense(kind):
    import torch

    class Showing(kind):
        @property
        def weight(self):
            if self.__dict__.get("spent"):
                return None
            return torch.nn.Parameter(self._buffers["weight"] * self.scale, requires_grad=False)

        def forward(self, input):
            output = torch.nn.functional.linear(input, self._buffers["weight"].to(input.dtype))
            return output * self.scale.to(input.dtype).squeeze(1)

    return Showing


# variants that keep every promise they make


@plugin()
class Calibrated(Variant):
    """Quantizes with calibration texts, and loads what it wrote."""

    options = CalibratedOptions
    capabilities = {"on_the_fly": False, "needs_calibration": True}

    @hookimpl
    def quantize(self, request, config, calibration, out):
        if not calibration:
            raise ConfigError("this backend needs calibration texts")
        from polyquant.plugin import checkpoints

        loaded = rowwise.load(request, config)
        loaded.tokenizer = checkpoints.load_tokenizer(request.source)  # the core gives one to what its load returns
        return rowwise.save(loaded, out)


@plugin()
class Reader(Variant):
    """Reads checkpoints that only others can make."""

    capabilities = {"on_the_fly": False}


@plugin()
class Runtime(Variant):
    """Says that its model is no torch module; the core then leaves what `load` returns as it is."""

    capabilities = {"runtime": "other"}

    @hookimpl
    def load(self, request, config):
        from polyquant.plugin import checkpoints

        loaded = rowwise.load(request, config)
        loaded.tokenizer = checkpoints.load_tokenizer(request.source)
        loaded.model.config.quantization_config = config.to_stored()
        return loaded


@plugin()
class Picky(Variant):
    """Refuses sizes that are no multiple of 64."""

    @hookimpl
    def load(self, request, config):
        if request.source.config["hidden_size"] % 64:
            raise ModelError(f"{request.source.name}: hidden_size must be a multiple of 64")
        return rowwise.load(request, config)


# what is declared: options that say how they round, a card that says what was measured


@plugin(breaks="facts_are_of_known_kinds")
class Textless(Variant):
    """Says that it calibrates, and quantizes while loading."""

    options = CalibratedOptions


@plugin(breaks="measured_figures_are_of_presets")
class Mismeasured(Variant):
    card = {"measured_kl": {"int7": 0.1}}


@plugin(breaks="names_are_its_own")
class Impostor(Variant):
    card = {"also_called": ("gptqmodel",)}

"""What to do where a check fails: the file, the hook, and the cure."""

from __future__ import annotations

from collections.abc import Mapping

from polyquant.errors import BackendFailed, PolyquantError
from polyquant.registry import hooks
from polyquant.testing.subject import Subject

OPTIONS = "options"  # stands where no hook but the options record is to be mended

CURES: Mapping[str, tuple[str, str]] = {
    "imports_nothing_heavy": (
        "backend_info", "import torch and your library in files whose names begin with an underscore",
    ),
    "facts_are_of_known_kinds": (OPTIONS, "say in rounding_method, number_format and level_bits what the options do"),
    "measured_figures_are_of_presets": ("backend_info", "give measured_kl figures of presets, or leave it out"),
    "names_are_its_own": ("backend_info", "take the names that are others' out of also_called"),
    "card_is_complete": ("backend_info", "complete the BackendInfo that it returns"),
    "capabilities_have_their_hooks": ("backend_info", "declare what is implemented, and implement what is declared"),
    "hooks_fit_the_specification": ("backend_info", "write its arguments as contract.hookspecs does, without defaults"),
    "no_device_is_a_problem": ("validate_environment", "return polyquant.plugin.device_problems(device, ...)"),
    "environment_check_is_quiet": (
        "validate_environment", "print and change nothing; wrap what a library does in polyquant.plugin.contained",
    ),
    "unknown_options_are_refused": ("build_config", "return polyquant.plugin.convert(YourOptions, options)"),
    "wrong_values_are_refused": (
        "build_config", "give each option a strict type, Literal for a choice, and let polyquant.plugin.convert check",
    ),
    "options_are_frozen": (OPTIONS, "class YourOptions(BackendOptions, frozen=True, kw_only=True, "
                                    "forbid_unknown_fields=True)"),
    "options_survive_conversion": ("build_config", "change no option that was given"),
    "loads": ("load", "quantize or read the model; refuse sizes that you cannot take with polyquant.errors.ModelError"),
    "is_in_eval_mode": ("load", "call .eval() on every module that you put into the model"),
    "config_is_the_effective_one": (
        "load", "pass on the `config` you were given, and leave model.config.quantization_config as it says",
    ),
    "runs_on_every_declared_device": ("load", "place each tensor as request.device_map says, or declare fewer devices"),
    "logits_are_whole": ("load", "see what the quantized module's forward returns: shape, dtype, NaN"),
    "greedy_decoding_is_deterministic": ("load", "keep randomness and state out of the quantized module's forward"),
    "stays_close_to_the_dense_model": ("load", "see how weights are rounded; the floor stands in the test class"),
    "describes_every_tensor_once": ("describe_layers", "let polyquant.plugin.layers.describe list the tensors"),
    "bits_and_schemes_are_declared": (
        "describe_layers", "give quantized layers the bits and scheme of the card's capabilities, and a kernel",
    ),
    "dense_tensors_have_reasons": ("describe_layers", "set `reason` where `quantized` is False"),
    "covers_the_model": ("load", "quantize every nn.Linear of the blocks"),
    "skipped_modules_stay_dense": ("load", "leave the modules named in config.skip as they are; pass them as `skipped` "
                                           "to polyquant.plugin.layers.describe"),
    "a_skip_pattern_without_a_match_is_refused": ("build_config", "leave config.skip as it was given"),
    "described_bytes_are_stored_bytes": (
        "describe_layers", "count weights, scales, zero points and codes: polyquant.plugin.layers.describe does",
    ),
    "plan_is_within_one_percent": ("plan_layers", "count a layer's bytes as your module stores it, constants included"),
    "what_is_declared_loads": (
        "backend_info", "declare the bits, schemes and quant_methods that options or make_checkpoint come to, no more",
    ),
    "compiles_with_torch": ("load", "keep torch.compile's limits in the module's forward, or leave compiles out"),
    "offloads_to_the_cpu": ("load", "place each layer as request.device_map says, or leave offloads out"),
    "memory_comes_back": ("load", "keep no reference to the model or its tensors: no globals, no caches"),
    "others_read_it_right_or_refuse_it": (
        "readable_by", "name transformers on the card if it reads the format, else write with checkpoints.save"
    ),
    "saves_and_loads_back": ("save", "write every tensor of the quantized modules exactly, and read all of it in load"),
    "writes_no_pickle": ("save", "write safetensors: polyquant.plugin.checkpoints.save does"),
    "wrong_tensors_are_refused": (
        "load", "hold the tensors of every layer against it: polyquant.plugin.layers.layer_tensors does",
    ),
    "contradicting_options_are_refused": (
        OPTIONS, "from_stored must give back every option; load_time names only those a checkpoint leaves free",
    ),
    "adapters_train_on_the_frozen_base": (
        "prepare_for_training", "freeze the base, call enable_input_require_grads, and let gradients through forward",
    ),
    "a_second_adapter_trains": (
        "prepare_for_training", "keep no state in the quantized module's forward that a pass with gradients changes",
    ),
    "adapters_merge_or_are_refused": (
        "prepare_for_training", "leave the model's mark as the core set it, by which PEFT is refused to merge",
    ),
    "dora_trains_or_is_refused": (
        "prepare_for_training", "let the module's `weight` be what it computes with, always, or packed",
    ),
    "packed_weights_are_the_librarys": (
        "pack", "return the codes, scales and offsets of the module as they are, in the layout that plan_layers names",
    ),
    "packed_layers_train": ("pack", "leave out what is no part of a plain linear layer: its plan then names no layout"),
    "packed_models_save_what_the_library_does": ("pack", "let load give the same weights each time"),
    "converted_layers_are_the_same": ("unpack", "let it be the way back from pack: the tensors that load reads"),
    "load_leaves_global_state_alone": (
        "load", "put back what your library changes: polyquant.plugin.contained, torch.random.fork_rng",
    ),
}  # fmt: skip
"""check -> (hook to look at, what to do)."""


def advise(subject: Subject, check: str, error: BaseException) -> str:
    """Where to look and what to do after `error` in a check: 'polyquant_acme/plugin.py:57, load: call .eval() ...'.

    An error from inside the plugin names its own line. Empty where the plugin cannot be used at all: the error says it.
    """
    try:
        plugin, options = subject.handle.plugin, subject.info.options
    except PolyquantError:
        return ""
    hook, cure = CURES[check]
    if raised := getattr(error, "hook", ""):
        must = hooks.CURES[raised]
        hook, cure = raised, f"mend it there; it must {must}" if isinstance(error, BackendFailed) else must
    at = hooks.raised_at(error.__cause__ or error, hooks.package_of(plugin))
    if not at:
        at = hooks.defined_at(options if hook == OPTIONS else getattr(plugin, hook, type(plugin)))
    return f"{at}, {hook}: {cure}"

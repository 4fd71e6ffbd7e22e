"""Names that users know backends by, and what answers to them here: archived libraries and those that followed them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

LIBRARY: Mapping[str, str] = {"gptq": "gptqmodel", "awq": "gptqmodel", "autogptq": "auto-gptq", "autoawq": "AutoAWQ"}
"""backend -> the library it stands on, where the name is that of a method or another library's."""
SAME_CHECKPOINTS: Mapping[str, tuple[str, ...]] = {
    "autogptq": ("gptq",),
    "gptq": ("autogptq",),
    "autoawq": ("awq",),
    "awq": ("autoawq",),
}
"""backend -> those that read the same checkpoints."""
READERS: Mapping[str, str] = {
    "awq": "polyquant-gptqmodel",
    "gptq": "polyquant-gptqmodel",
    "hqq": "polyquant-hqq",
    "quanto": "polyquant-quanto",
    "torchao": "polyquant-torchao",
    "auto-round": "polyquant-auto-round",
    "compressed-tensors": "polyquant-compressed-tensors",
    "bitsandbytes": "polyquant-bitsandbytes",
    "gguf": "polyquant-gguf",
    "aqlm": "polyquant-aqlm",
    "bitnet": "polyquant-bitnet",
    "quark": "polyquant-quark",
    "sinq": "polyquant-sinq",
    "fp8": "polyquant-fp8",
    "fouroversix": "polyquant-fouroversix",
}
"""quant_method -> the plugin package that reads it."""
BACKENDS = tuple(sorted({*READERS, "llama-cpp", "autoawq", "autogptq"}))
"""Every backend of this repository; the last three read what gguf, awq and gptq read."""
OTHER_NAMES: Mapping[str, str] = {
    "auto-gptq": "autogptq", "auto_gptq": "autogptq", "gptqmodel": "gptq", "auto-awq": "autoawq", "auto_awq": "autoawq",
    "bnb": "bitsandbytes", "autoround": "auto-round", "auto_round": "auto-round", "optimum-quanto": "quanto",
    "compressed_tensors": "compressed-tensors", "llmcompressor": "compressed-tensors", "llama.cpp": "llama-cpp",
    "llama_cpp": "llama-cpp", "amd-quark": "quark", "ao": "torchao",
}  # fmt: skip
"""what a library or transformers calls it -> the backend's name here."""


def package_of(backend: str) -> str:
    """The plugin package that a backend of this repository comes with."""
    return READERS.get(backend, f"polyquant-{backend}")


PACKAGES = tuple(sorted({package_of(backend) for backend in BACKENDS}))
"""Every plugin package of this repository."""


def hint(name: str, installed: Collection[str]) -> str:
    """What stands in for the backend `name`, which is not installed; empty where nothing is known of it."""
    own = OTHER_NAMES.get(name, name)
    if own in installed:
        return f" {name!r} is called {own!r} here."
    others = [each for each in SAME_CHECKPOINTS.get(own, ()) if each in installed]
    if others:
        library = LIBRARY[others[0]]
        command = f"pip install {package_of(own)}"
        return f" {others[0]} ({library}) reads these checkpoints too: take that, or run: {command}."
    known = own in OTHER_NAMES.values() or own in SAME_CHECKPOINTS
    return f" Run: pip install {package_of(own)}." if known else ""

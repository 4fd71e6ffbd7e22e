"""What differs between the versions of transformers that polyquant supports (4.51 to the newest 5.x).

Everything else in the core, and every plugin, calls these names and never asks for a version.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from packaging.version import Version

from polyquant.environment import quiet_imports

with quiet_imports():
    import transformers
    import transformers.quantizers.auto  # it imports every quantization library that is installed

VERSION_5 = Version(transformers.__version__) >= Version("5.0.0.dev0")


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """`from_pretrained`'s dtype argument: `dtype` since 4.56, `torch_dtype` before."""
    return {"dtype" if Version(transformers.__version__) >= Version("4.56.0") else "torch_dtype": dtype}


def tied_tensors(model: Any) -> dict[str, str]:
    """Tensor name -> the tensor it is tied to."""
    if VERSION_5:
        return dict(model.all_tied_weights_keys)
    if not model.config.get_text_config().tie_word_embeddings or model.get_output_embeddings() is None:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def default_dense_modules(model: Any) -> set[str]:
    """Names of the modules that transformers' quantizers keep dense unless told otherwise: the head and tied ones."""
    home = "transformers.quantizers.base" if VERSION_5 else "transformers.integrations.bitsandbytes"
    names = importlib.import_module(home).get_keys_to_not_convert(model)
    return {name.removesuffix(".weight") for name in names}


@contextmanager
def progress_bars(enabled: bool) -> Iterator[None]:
    """Draw transformers' and the hub's progress bars only where `enabled`; what was set before comes back."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    before, gguf_bar = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    _set_progress_bars(enabled)
    modeling_gguf_pytorch_utils.tqdm = partial(gguf_bar, disable=not enabled)  # it does not ask the setting
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        _set_progress_bars(before)


def _set_progress_bars(enabled: bool) -> None:
    from transformers.utils import logging

    if enabled:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()


def forget_quantization(model: Any) -> None:
    """Make a model that was dequantized while loading saveable as the dense model it is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

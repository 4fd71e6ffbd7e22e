"""Some architectures cannot run, or train, as a format has their layers: a few tokens tell, and which layers it is."""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from polyquant.errors import ConfigError, ModelError, OutOfMemory, PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.memory.adapted import base_name, is_adapters
from polyquant.modules import module_of

TRIED_TOKENS = 3
DEVICE_FAULT = "CUDA error"
SHOWN_LETTERS = 200  # of a library's error


def require_running(loaded: LoadedModel) -> None:
    """Raises ConfigError, with the modules to skip, where the model's code fails on a layer as it is quantized.

    Raises ModelError where it fails elsewhere, BackendFailed where the backend's own code has a slip, OutOfMemory where
    the device has no room for a forward pass.
    """
    import torch

    try:
        loaded.logits(range(min(TRIED_TOKENS, loaded.vocabulary)))
    except (PolyquantError, MemoryError):
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the model was loaded, and there is no room to run {TRIED_TOKENS} tokens: {error}"
        ) from error
    except Exception as error:  # of the model's code and the backend's layers, which were not written for each other
        raise _explained(loaded, error, "run") or ModelError(_what(loaded, error, "run")) from error


def require_keeping(loaded: LoadedModel) -> None:
    """Raises ConfigError where the load was asked for a quantized key-value cache and the model does not fill it."""
    if loaded.kv_cache == "keep":
        return
    from polyquant.models.generation import state_after
    from polyquant.models.kv_cache import require_filled

    tokens = range(min(TRIED_TOKENS, loaded.vocabulary))
    state = state_after(loaded.model, tokens, loaded.kv_cache)
    require_filled(state and state.value, len(tokens), loaded.request.source.name if loaded.request else "the model")


@contextmanager
def training(loaded: LoadedModel) -> Iterator[None]:
    """Raises ConfigError, with the modules to skip, where training fails on a layer as it is quantized.

    The code of some architectures takes another way when it trains, and reads a layer's weight itself there. What is
    about no layer, as of an optimizer or the data, is raised as it is.
    """
    try:
        yield
    except (PolyquantError, MemoryError):
        raise
    except Exception as error:
        if (explained := _explained(loaded, error, "train")) is None:
            raise
        raise explained from error


def _explained(loaded: LoadedModel, error: BaseException, to: str) -> PolyquantError | None:
    """BackendFailed for a slip of the backend, ConfigError for what is about quantized modules; None for the rest.

    to: what the model cannot do.
    """
    if (slip := loaded.backend.own_fault(error)) is not None:
        return slip
    if DEVICE_FAULT in str(error):  # raised later than where it happened, and after it nothing runs
        return None
    quantized = {module_of(layer) for layer in loaded.initial_layers if layer.quantized}
    skip = culprits(loaded.model, error, quantized)
    if not skip:
        return None
    stored = loaded.settled is not None and loaded.settled.route == "as stored"
    again = "make the checkpoint again from the dense model, with" if stored else "keep them dense:"
    shown = ", ".join(map(repr, skip))
    return ConfigError(
        f"{_what(loaded, error, to)}. The code of this architecture cannot use {', '.join(skip)} as "
        f"{loaded.backend.name} has them; {again} skip=({shown},) (--skip {','.join(skip)})"
    )


def _what(loaded: LoadedModel, error: BaseException, to: str) -> str:
    name = loaded.request.source.name if loaded.request else "the model"
    words = str(error).partition("\n")[0][:SHOWN_LETTERS].rstrip(".")
    return f"{name} was loaded with {loaded.backend.name} and cannot {to}: {type(error).__name__}: {words}"


def culprits(model: Any, error: BaseException, quantized: Collection[str]) -> list[str]:
    """Last name parts of the quantized modules that `error` is about; none where it is about no such module.

    The innermost module of the model in whose code it was raised: itself, the quantized one that it is a part of, or
    those that its lines name.
    """
    names = {id(module): base_name(name) for name, module in model.named_modules()}
    frames = list(traceback.walk_tb(error.__traceback__))
    innermost = None
    for (frame, _), summary in reversed(list(zip(frames, traceback.extract_tb(error.__traceback__), strict=True))):
        name = names.get(id(frame.f_locals.get("self")))
        if name is None:
            continue
        innermost = name if innermost is None else innermost
        if name in quantized and f"{innermost}.".startswith(f"{name}.") and not is_adapters(innermost):
            return [name.rpartition(".")[2]]
        if name != innermost:
            continue
        line = summary.line or ""
        inside = {each.rpartition(".")[2] for each in quantized if each.startswith(f"{name}." if name else "")}
        bare = {word for word in re.findall(r"(\w+)\.weight", line) if word in inside}
        if found := bare or inside.intersection(re.findall(r"\w+", line)):
            return sorted(found)
    return []

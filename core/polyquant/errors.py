"""Every error polyquant raises on purpose. Each message says what happened, what is there, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self


class PolyquantError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""

    exit_code = 2  # of the command line: 2 wrong use, 1 the work failed


class ConfigError(PolyquantError):
    """An option is unknown or has a value that is not allowed. Raised before any file is read."""

    unfit = ""  # what of a tensor the options do not fit; set where the message ends with options that would

    @classmethod
    def of_unfit(cls, what: str, ways: Iterable[str]) -> Self:
        """The error for a tensor that the options do not fit. ways: options that would."""
        error = cls(f"{what}; use {' or '.join(ways)}")
        error.unfit = what
        return error


class UnknownBackend(PolyquantError):
    """No installed plugin has this name, or no installed plugin reads this checkpoint."""


class BrokenBackend(PolyquantError):
    """A plugin is installed but cannot be used: it fails to import, lacks a hook, or answers with the wrong type."""

    exit_code = 1
    hook = ""  # the hook that gave a wrong answer


class BackendConflict(BrokenBackend):
    """Two distributions claim one backend name."""


class BackendFailed(PolyquantError):
    """The backend's library raised; its own error is the cause of this one."""

    exit_code = 1
    hook = ""  # the hook in which it did


class UnsupportedOperation(PolyquantError):
    """The backend does not implement this operation. Raised before any work is done."""


class CastRefused(UnsupportedOperation, ValueError):
    """A quantized model is asked for another dtype; a ValueError too, as transformers raises for its own models."""


class EnvironmentProblem(PolyquantError):
    """This machine cannot run the backend as asked; the message lists every problem with its fix."""

    exit_code = 1


class ModelError(PolyquantError):
    """The model cannot be read: missing, empty, damaged, unsafe, or not a causal language model."""


class CheckpointConflict(PolyquantError):
    """The checkpoint is quantized already, in a way that contradicts the options asked for."""


class PlacementError(PolyquantError):
    """Part of the model would spill to a slower device than the one asked for."""


class DenseModelError(PolyquantError):
    """The load ended with a model that is not quantized, and `allow_dequantize` was not given."""

    exit_code = 1


class SaveError(PolyquantError):
    """A checkpoint could not be written; what was at the destination before is still there."""

    exit_code = 1


class AdapterError(PolyquantError):
    """An adapter does not fit the model: another architecture, other shapes, or no adapter at all."""


class TrainingConflict(PolyquantError):
    """An unfinished run with other options, data or model lies where this one would go on."""


class TrainingDiverged(PolyquantError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 1


class OutOfMemory(PolyquantError):
    """The device's memory did not suffice; the message says what to lower."""

    exit_code = 1


class MergeRefused(PolyquantError):
    """A merged model is further from base and adapter than the gate allows; nothing was written."""

    exit_code = 1


class ConversionRefused(PolyquantError):
    """A format has no place for something of the weights, or a requantized model is further than the gate allows."""

    exit_code = 1


class Misfit(ConversionRefused):
    """A format has no place for a property of one weight. Raised by plugins; the core says which layers have it."""

    def __init__(self, trait: str, what: str) -> None:
        """trait: 'bits', 'group size', 'zero points', 'act-order', ...; what: what there is, and what there may be."""
        super().__init__(f"{trait}: {what}")
        self.trait, self.what = trait, what


class ComparisonBusy(PolyquantError):
    """Another comparison is running in the same folder."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean 'nf4'?' for the closest known word, or an empty string where none is close."""
    from difflib import get_close_matches

    close = get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""

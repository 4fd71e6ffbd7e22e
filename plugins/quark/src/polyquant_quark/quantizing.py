"""Makes checkpoints with amd-quark, which only this needs: what is asked is checked before it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import Library, LoadRequest, import_problems, library_problems, resolved_dtype

from polyquant_quark._quiet import quiet_quark
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import plan_layers

AMD_QUARK = Library(distribution="amd-quark", versions=">=0.13,<0.14", module="quark.torch")


def quantize(request: LoadRequest, config: QuarkOptions, calibration: Sequence[str], out: Path) -> Path:
    """Raises ConfigError for what makes no checkpoint, EnvironmentProblem where amd-quark is not there or fails."""
    if calibration:
        raise ConfigError(
            "Quark rounds weights to nearest here and uses no calibration text; leave calibration (--calibration) out"
        )
    skeleton = hf.skeleton(request.source, resolved_dtype(config), trust_remote_code=request.trust_remote_code)
    weights = list_weights(skeleton)
    plan_layers(weights, config)  # refuses what does not fit
    if experts := next((weight.name for weight in weights if weight.role == "experts"), ""):
        raise ConfigError(
            f"{experts} are fused experts, and amd-quark leaves those dense, most of this model's weights; "
            "choose a backend that takes experts"
        )
    problems = library_problems((AMD_QUARK,))
    with quiet_quark(progress=request.progress):
        if not problems:
            problems = import_problems((AMD_QUARK,))
        if problems:
            lines = [f"  - {problem.what}\n    fix: {problem.fix}" for problem in problems]
            raise EnvironmentProblem("Quark checkpoints are made with amd-quark:\n" + "\n".join(lines))
        from polyquant_quark import _quantize

        return _quantize.quantize(request, config, weights, out)

"""Makes checkpoints with llm-compressor, which only this needs: what is asked is checked before it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.plugin import Library, LoadRequest, import_problems, library_problems

from polyquant_compressed_tensors.options import CompressedTensorsOptions

LLM_COMPRESSOR = Library(distribution="llmcompressor", versions=">=0.14,<0.15")


def quantize(request: LoadRequest, config: CompressedTensorsOptions, calibration: Sequence[str], out: Path) -> Path:
    """Raises ConfigError for options that make no checkpoint, EnvironmentProblem where llm-compressor is not there."""
    if config.method == "unknown":
        raise ConfigError("method 'unknown' is for checkpoints that do not say theirs; quantize with 'rtn' or 'gptq'")
    if config.method == "rtn" and calibration:
        raise ConfigError(
            "method 'rtn' rounds to nearest and uses no calibration text; leave calibration (--calibration) out, "
            "or choose method='gptq'"
        )
    from polyquant_compressed_tensors._quiet import quiet_llm_compressor

    problems = library_problems((LLM_COMPRESSOR,))
    with quiet_llm_compressor(progress=request.progress):
        if not problems:
            problems = import_problems((LLM_COMPRESSOR,))
        if problems:
            lines = [f"  - {problem.what}\n    fix: {problem.fix}" for problem in problems]
            raise EnvironmentProblem("llm-compressor, which makes these checkpoints, cannot run:\n" + "\n".join(lines))
        from polyquant_compressed_tensors import _quantize

        return _quantize.quantize(request, config, calibration, out)

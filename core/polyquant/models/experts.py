"""Fused experts as transformers' one interface multiplies them: which tensors hold them, and which way they lie."""

from __future__ import annotations

from typing import Any

from polyquant.types import Stacked

SAYS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What a module of that interface says of itself (`transformers.integrations.moe.use_experts_implementation`)."""


def expert_matrices(module: Any) -> tuple[str, ...]:
    """Names of the two tensors that hold the matrices of all experts; none for a module of another kind."""
    if not all(hasattr(module, name) for name in SAYS):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def how_stacked(module: Any, name: str) -> Stacked:
    """How the experts lie in the tensor of that name of `module`."""
    if name not in expert_matrices(module):
        return ""
    return "in_out" if module.is_transposed else "out_in"

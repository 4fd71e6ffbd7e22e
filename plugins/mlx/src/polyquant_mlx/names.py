"""What MLX calls the modules of a model, and what transformers calls them: they differ in mixtures of experts.

mlx-lm has the experts' gates, ups and downs stacked one by one, (experts, out_features, in_features); transformers has
gates and ups in one tensor, gates first, or in gpt-oss in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

MIXTURES: Mapping[str, str] = {
    "mixtral": "block_sparse_moe.switch_mlp", "qwen3_moe": "mlp.switch_mlp", "qwen2_moe": "mlp.switch_mlp",
    "olmoe": "mlp.switch_mlp", "gpt_oss": "mlp.experts",
}  # fmt: skip
"""model_type -> mlx-lm's module that has the stacks of a layer's experts. In transformers it is called mlp.experts."""
IN_TURN = ("gpt_oss",)
"""model_types in which rows of gates and ups take turns in transformers' tensor."""
STACKS: Mapping[str, Mapping[str, str]] = {
    "gate_up_proj": {"gate_proj.": "gate_proj", "up_proj.": "up_proj"}, "down_proj": {"": "down_proj"},
}  # fmt: skip
"""transformers' tensor of experts -> the parts of it, in their order, by what is read of them -> MLX's stack."""
RENAMES: Mapping[str, str] = {
    r"\.(block_sparse_moe|mlp)\.switch_mlp\.(gate|up)_proj\.": r".mlp.experts.gate_up_proj.\2_proj.",
    r"\.(block_sparse_moe|mlp)\.switch_mlp\.down_proj\.": ".mlp.experts.down_proj.",
    r"\.block_sparse_moe\.gate\.": ".mlp.gate.",
    r"\.mlp\.experts\.(gate|up)_proj\.bias$": r".mlp.experts.gate_up_proj_bias.\1_proj",
    r"\.mlp\.experts\.down_proj\.bias$": ".mlp.experts.down_proj_bias",
    r"\.mlp\.experts\.(gate|up)_proj\.": r".mlp.experts.gate_up_proj.\1_proj.",
}
"""Of stored tensors: what is found in a name -> what takes its place in the model."""


def paths_in_mlx(tensor: str) -> list[str]:
    """What MLX may call the modules that hold a tensor of transformers' model."""
    block, _, stack = tensor.partition(".mlp.experts.")
    if stack not in STACKS:
        return [tensor.removesuffix(".weight")]
    return [f"{block}.{home}.{name}" for home in dict.fromkeys(MIXTURES.values()) for name in STACKS[stack].values()]


def in_mlx(name: str, model_type: str) -> str:
    """A tensor that is no stack of experts, as MLX calls it."""
    home = MIXTURES.get(model_type, "mlp.").partition(".")[0]
    return name.replace(".mlp.", f".{home}.") if home != "mlp" else name


def owner(module: str) -> str:
    """The module, or tensor of experts, that a stored tensor belongs to, by the module in its name in the model."""
    head, _, last = module.rpartition(".")
    return head if head.endswith(".experts.gate_up_proj") and last in ("gate_proj", "up_proj") else module

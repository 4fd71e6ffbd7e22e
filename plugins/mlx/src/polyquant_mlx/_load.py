"""Quantizes layer by layer, reads checkpoints, and writes folders that mlx-lm runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from polyquant.errors import ModelError, SaveError
from polyquant.plugin import LoadedModel, LoadRequest, WeightInfo, checkpoints, module_of, resolved_dtype
from polyquant.plugin.layers import ExpertStack, LinearExperts
from torch import nn

from polyquant_mlx._decode import decode
from polyquant_mlx._layers import (
    KERNEL,
    checked,
    experts_from_tensors,
    form_of,
    linear_from_tensors,
    quantize_embedding,
    quantize_experts,
    quantize_linear,
    stack_of,
    stored_tensors,
)
from polyquant_mlx._modules import MlxEmbedding, MlxLinear, share_tied
from polyquant_mlx.formats import Format
from polyquant_mlx.names import IN_TURN, MIXTURES, STACKS, in_mlx, owner, paths_in_mlx
from polyquant_mlx.options import OWN, MlxOptions
from polyquant_mlx.planning import plan_layers

PACKED = (MlxLinear, MlxEmbedding)
HELD_DENSE = "{} is packed in the checkpoint, and held dense: {} does more than multiply"


def load(request: LoadRequest, config: MlxOptions) -> LoadedModel:
    planned = [plan for plan in plan_layers(request.weights, config) if plan.quantized]
    names = [plan.name if plan.role == "experts" else module_of(plan) for plan in planned]
    forms = {
        name: config.format_for(_weight(request.weights, plan.name)) for name, plan in zip(names, planned, strict=True)
    }
    notes: list[str] = []
    if request.source.stored_quantization:
        model = _read(request, config, forms, notes)
        vocabulary = "quantize" if any(plan.role in ("embedding", "head") for plan in planned) else "dense"
        scales = [
            each.scales.dtype for each in model.modules() if isinstance(each, PACKED) and each.form.mode == "affine"
        ]
        dtype = str(scales[0]).removeprefix("torch.") if scales else config.scale_dtype
        config = msgspec.structs.replace(config, vocabulary=vocabulary, scale_dtype=dtype)
    else:
        model = _quantize(request, config, forms)
    model.config.quantization_config = config.to_stored()
    return LoadedModel(model=model.eval(), config=config, kernel=KERNEL, notes=notes)


def _weight(weights: Sequence[WeightInfo], name: str) -> WeightInfo:
    return next(weight for weight in weights if weight.name == name)


def _quantize(request: LoadRequest, config: MlxOptions, forms: Mapping[str, Format]) -> Any:
    wanted = resolved_dtype(config)

    def make(name: str, dense: Any) -> Any:
        if isinstance(dense, torch.Tensor):
            is_turned = _weight(request.weights, name).stacked == "in_out"
            return quantize_experts(dense, forms[name], config, transposed=is_turned)
        if isinstance(dense, nn.Embedding):
            return quantize_embedding(dense, forms[name], config, getattr(torch, wanted))
        return quantize_linear(dense, config, forms[name])

    def share(model: Any) -> None:
        share_tied(model, checkpoints.tied_tensors(model))

    return checkpoints.quantize_layers(request, wanted, list(forms), make, after=share, by_rows=True)


def _read(request: LoadRequest, config: MlxOptions, forms: Mapping[str, Format], notes: list[str]) -> Any:
    """Raises ModelError for a packed layer that the model has not, and for tensors that are not their format's."""
    wanted = resolved_dtype(config)
    dtype = getattr(torch, wanted)
    scales = (f"{module}.scales" for module in checkpoints.packed_modules(request.source, ("scales",)))
    held = {owner(request.names.get(name, name).removesuffix(".scales")) for name in scales}
    others = held - set(forms)
    known = {module_of(weight): weight for weight in request.weights if len(weight.shape) == 2}
    if astray := sorted(others - set(known)):
        named = ", ".join(astray[:3])
        raise ModelError(f"{request.source.name}: {len(astray)} packed layers are none of the model: {named}")

    in_turn = request.source.config.get("model_type") in IN_TURN

    def make(name: str, dense: Any, tensors: dict[str, torch.Tensor]) -> Any:
        if name in others:
            return held_dense(name, dense, tensors)
        form = forms[name]
        if isinstance(dense, torch.Tensor):
            is_turned = _weight(request.weights, name).stacked == "in_out"
            parts = list(STACKS[name.rpartition(".")[2]])
            return experts_from_tensors(dense, form, tensors, parts, transposed=is_turned, in_turn=in_turn)
        if isinstance(dense, nn.Embedding):
            own = checked((dense.num_embeddings, dense.embedding_dim), form, tensors, bias=False)
            return MlxEmbedding(dense, form, own, dtype)
        return linear_from_tensors(dense, form, tensors, dtype)

    def held_dense(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        """A router, which mlx-lm packs; in transformers it is a module of its own kind."""
        weight = known[name]
        form = config.format_for(weight)
        bias = tensors.pop("bias", None)
        own = checked(weight.shape, form, tensors, bias=False)
        numbers = decode(own["weight"], own["scales"], own.get("biases"), form, own["scales"].dtype
                         if form.mode == "affine" else torch.float32)  # fmt: skip
        module.weight = nn.Parameter(numbers.to(getattr(torch, weight.dtype)), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=False)
        notes.append(HELD_DENSE.format(name, weight.module))
        return module

    model = checkpoints.read_layers(request, wanted, [*forms, *sorted(others)], make, owner=owner, joined=join_biases)
    share_tied(model, checkpoints.tied_tensors(model))
    return model


def save(loaded: LoadedModel, out: Path) -> Path:
    """A folder that mlx-lm runs; with layout="metal" a checkpoint as transformers has them for Apple GPUs.

    Raises SaveError for a mixture that mlx-lm has no name for here.
    """
    model, config = loaded.model, loaded.config
    metal = config.layout == "metal"
    packed = {name: module for name, module in model.named_modules()
              if isinstance(module, (*PACKED, LinearExperts))}  # fmt: skip
    tied = {name.rpartition(".")[0] for name in checkpoints.tied_tensors(model)}
    kind = "" if metal else str(model.config.model_type)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        home = name.rpartition(".")[0]
        if home not in packed or name.endswith(".bias"):
            tensors |= _dense(name, tensor, kind)
    for name, module in packed.items():
        if isinstance(module, ExpertStack):
            tensors |= _stacks(name, module, kind)
        elif name not in tied:
            own = stored_tensors(module, metal=metal)
            tensors |= {f"{in_mlx(name, kind)}.{short}": tensor for short, tensor in own.items()}
    if metal:
        dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        said = {key: value for key, value in config.to_stored().items() if key != OWN} | {
            "modules_to_not_convert": dense
        }
        return checkpoints.save(loaded, out, tensors, said, named=checkpoints.MODEL)
    stored = _quantization({name: module for name, module in packed.items() if name not in tied}, config.format, kind)
    checkpoints.save(loaded, out, tensors, stored, named=checkpoints.MODEL, written_for="mlx")
    path = out / "config.json"
    path.write_text(json.dumps(for_mlx(json.loads(path.read_text(encoding="utf-8")), stored), indent=2) + "\n")
    return out


def write_unpacked(loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, torch.Tensor]]], out: Path) -> Path:
    """As `save`, of a model whose layers are `layers`."""
    config: Any = loaded.config
    for name, tensors in layers:
        linear, form = loaded.model.get_submodule(name), form_of(name, config)
        if isinstance(linear, ExpertStack):
            checkpoints.put(loaded.model, name, stack_of(linear, form, tensors))
            continue
        own = checked((linear.out_features, linear.in_features), form, tensors, bias=False)
        bias = {} if linear.bias is None else {"bias": linear.bias.detach()}
        loaded.model.set_submodule(name, MlxLinear(linear, form, {**own, **bias}))
    return save(loaded, out)


def join_biases(dense: dict[str, torch.Tensor]) -> None:
    """Put gpt-oss's biases of gates and ups, which mlx-lm has one by one, into transformers' tensor of both."""
    for name in [name for name in dense if name.endswith(".gate_up_proj_bias.gate_proj")]:
        home = name.removesuffix(".gate_proj")
        if f"{home}.up_proj" in dense:
            pair = [dense.pop(f"{home}.{part}") for part in ("gate_proj", "up_proj")]
            dense[home] = torch.stack(pair, -1).flatten(-2)


def _dense(name: str, tensor: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """A tensor that is no packed one, as mlx-lm calls it: its stacks of gpt-oss have their biases in them."""
    home, _, last = name.rpartition(".")
    if kind in IN_TURN and last == "down_proj_bias":
        return {f"{home}.down_proj.bias": tensor}
    if kind in IN_TURN and last == "gate_up_proj_bias":
        return {f"{home}.{part}.bias": tensor[:, start::2].contiguous()
                for start, part in enumerate(("gate_proj", "up_proj"))}  # fmt: skip
    return {in_mlx(name, kind): tensor}


def _stacks(name: str, stack: LinearExperts, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of the experts of a tensor, as mlx-lm calls and divides them."""
    paths = _paths(name, kind)
    divided: dict[str, torch.Tensor] = {}
    for short, tensor in stored_tensors(stack).items():
        count = len(paths)
        pieces = [tensor[:, part::count] for part in range(count)] if kind in IN_TURN else tensor.chunk(count, 1)
        divided |= {f"{path}.{short}": piece.contiguous() for path, piece in zip(paths, pieces, strict=True)}
    return divided


def _paths(name: str, kind: str) -> list[str]:
    """mlx-lm's modules of a packed module or tensor of experts."""
    if ".mlp.experts." not in name:
        return [in_mlx(name, kind)]
    if kind not in MIXTURES:
        raise SaveError(f"{name} holds experts, and what mlx-lm calls those of {kind} is not known here: there are "
                        f"{', '.join(MIXTURES)}")  # fmt: skip
    return [path for path in paths_in_mlx(name) if f".{MIXTURES[kind]}." in path]


def _quantization(packed: Mapping[str, Any], form: Format, kind: str) -> dict[str, Any]:
    """MLX's entry of config.json: the format of most, and each path with another one."""
    others = {name: own for name, module in packed.items() if (own := _form(module)) != form}
    return form.keys | {path: own.keys for name, own in others.items() for path in _paths(name, kind)}


def _form(module: Any) -> Format:
    form: Format = module.like.form if isinstance(module, LinearExperts) else module.form
    return form


def for_mlx(config: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what mlx-lm looks for: `quantization`, and words that transformers 4 had, of rotary embeddings
    and of how many experts there are."""
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    older = {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in full.items() if key not in older}
    if MIXTURES.get(str(config.get("model_type"))) == "mlp.switch_mlp" and "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    return config | older | {"quantization": dict(stored)}

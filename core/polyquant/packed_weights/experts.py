"""The experts of a layer, packed, each multiplied with the tokens that are routed to it. Imports torch.

A model's own module stays, with its gate, biases and norms: only its two stacked matrices are others, and what goes
through all experts. That is `transformers.integrations.moe`'s `grouped_mm`, one expert at a time. The matrices lie in
the packed layout, or as a backend's own linear layers have them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from polyquant.models.experts import expert_matrices
from polyquant.packed_weights.frozen import PackedLinear, frozen_linear
from polyquant.packed_weights.linear import Holding, Multiplied, decoded, named, product
from polyquant.packed_weights.weight import PackedWeight


class ExpertStack(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A matrix of each expert of a layer, whose tensors have one more axis before the others."""

    count: int
    shape: tuple[int, int]  # of one, (out_features, in_features)
    transposed: bool  # whether the dense tensor is (experts, in_features, out_features)

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """Of the tensor that it stands for."""
        rows, columns = self.shape
        return (self.count, columns, rows) if self.transposed else (self.count, rows, columns)

    def multiply(self, expert: int, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """input @ W.T + bias of one expert. input: (tokens, in_features). Returns (tokens, out_features)."""
        raise NotImplementedError

    def expert_weights(self) -> Iterable[Tensor]:
        """W of each expert, float32 (out_features, in_features), one after the other."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The tensor that it stands for, float32 `dense_shape`."""
        whole = torch.stack(list(self.expert_weights()))
        return whole.transpose(1, 2).contiguous() if self.transposed else whole


class LinearExperts(ExpertStack):
    """A matrix of each expert, as a backend's linear layers have theirs: only packed tensors are kept."""

    def __init__(self, like: PackedLinear, tensors: Mapping[str, Tensor], *, transposed: bool = False) -> None:
        """like: a layer of one expert, of which all but the tensors is kept. tensors: of all, (experts, ...), by name.

        transposed: whether the dense tensor is (experts, in_features, out_features).
        """
        super().__init__()
        self.__dict__["like"] = copy.copy(like)  # no child: its tensors are the stack's
        self.like.__dict__["_parameters"] = dict.fromkeys(like._parameters)
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.count = len(next(iter(tensors.values())))
        self.shape, self.transposed = (like.out_features, like.in_features), transposed
        self.eval()

    @classmethod
    def of(cls, layers: Iterable[PackedLinear], count: int, *, transposed: bool = False) -> LinearExperts:
        """layers: of `count` experts, without biases, taken one by one."""
        first, tensors = None, dict[str, Tensor]()
        for expert, layer in enumerate(layers):
            own = {name: part for name, part in layer._parameters.items() if part is not None}
            if first is None:
                first, tensors = layer, {name: part.new_empty(count, *part.shape) for name, part in own.items()}
            for name, part in own.items():
                tensors[name][expert] = part.detach()
        assert first is not None
        return cls(first, tensors, transposed=transposed)

    @property
    def rounds_activations(self) -> bool:
        """Whether it is more than weights: as its layers are."""
        return bool(self.like.rounds_activations)

    def expert(self, number: int, bias: Tensor | None = None) -> PackedLinear:
        """The layer of one expert, whose tensors are views of the stack's."""
        layer: PackedLinear = copy.copy(self.like)
        views = {name: tensor[number] for name, tensor in self._parameters.items()}
        layer.__dict__["_parameters"] = {**self.like._parameters, **views, "bias": bias}
        return layer

    def multiply(self, expert: int, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """input @ W.T + bias of one expert. input: (tokens, in_features). Returns (tokens, out_features)."""
        return self.expert(expert, bias)(input)

    def expert_weights(self) -> Iterable[Tensor]:
        """W of each expert, float32 (out_features, in_features), one after the other."""
        return (self.expert(number).dequantize() for number in range(self.count))

    def extra_repr(self) -> str:
        return f"{self.count} experts, {self.shape}, {type(self.like).__name__}"


class RepackedExperts(Holding, ExpertStack):
    """A matrix of each expert of a layer: parts of a packed weight, with one more axis before the others."""

    def __init__(
        self, weights: Iterable[PackedWeight], count: int, scheme: str, bits: float, *, transposed: bool = False
    ) -> None:
        """weights: `count` of one shape and layout, taken one by one; scheme, bits: what they are called.

        transposed: whether the dense tensor is (experts, in_features, out_features).
        """
        super().__init__()
        for expert, weight in enumerate(weights):
            for name, part in named(weight).items():
                if expert == 0:
                    self.register_parameter(name, torch.nn.Parameter(part.new_empty(count, *part.shape), False))
                self._parameters[name].data[expert] = part
            if expert == 0:
                self._hold(weight, scheme, bits)
        self.count, self.transposed, self.activations = count, transposed, "int16"
        self.eval()

    @classmethod
    def of_parts(cls, parts: PackedWeight, scheme: str, bits: float, *, transposed: bool = False) -> RepackedExperts:
        """parts: of all experts, each tensor with one more axis before the others; they become the module's own."""
        stack = cls((), len(parts.codes), scheme, bits, transposed=transposed)
        for name, part in named(parts).items():
            stack.register_parameter(name, torch.nn.Parameter(part, requires_grad=False))
        stack._hold(parts, scheme, bits)
        return stack

    @property
    def packed(self) -> list[PackedWeight]:
        """The weight of each expert, (out_features, in_features), whose tensors are views of the module's own."""
        return [weight for weight, _ in self._each()]

    def multiply(self, expert: int, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """input @ W.T + bias of one expert. input: (tokens, in_features). Returns (tokens, out_features)."""
        weight, struct = self._each()[expert]
        multiply = partial(product, weight=weight, struct=struct, bias=bias, activations=self.activations)
        return frozen_linear(input, partial(decoded, weight, struct), bias, multiply)

    def expert_weights(self) -> Iterable[Tensor]:
        """W of each expert, float32 (out_features, in_features), one after the other."""
        return (torch.cat(list(decoded(*each))) for each in self._each())

    def extra_repr(self) -> str:
        return f"{self.count} experts, {self.shape}, {self.scheme}"

    def _each(self) -> list[Multiplied]:
        return self._gathered(self._multiplied_each)

    def _multiplied_each(self, parts: dict[str, Tensor]) -> list[Multiplied]:
        return [self._multiplied({name: part[expert] for name, part in parts.items()}) for expert in range(self.count)]


def has_packed(module: Any) -> bool:
    """Whether the experts of a module are packed."""
    return any(isinstance(child, ExpertStack) for child in module.children())


def put_in(module: Any, name: str, stack: ExpertStack) -> None:
    """Let a module of experts multiply with `stack` in the place of its tensor, or its stack, of that name."""
    delattr(module, name)
    module.add_module(name, stack)
    module.forward = MethodType(_forward, module)


def put_back(module: Any, dtype: torch.dtype) -> None:
    """Let a module of experts be dense again, with the numbers that it multiplied with, frozen."""
    for name in expert_matrices(module):
        stack = getattr(module, name)
        if isinstance(stack, ExpertStack):
            delattr(module, name)
            dense = stack.dequantize().to(next(stack.parameters()).device, dtype)
            module.register_parameter(name, torch.nn.Parameter(dense, requires_grad=False))
    del module.forward


@torch.compiler.disable  # type: ignore[untyped-decorator]  # how many tokens go where is another each time
def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' answers, weighted and summed. hidden_states: (tokens, hidden); the others: (tokens, k).

    Numbers of experts from `num_experts` on stand for none, as where a mixture is spread over several processes.
    """
    (count, width), chosen = top_k_index.shape, top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    tokens_of = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
    taken = order[: sum(tokens_of)]
    if not len(taken):
        return torch.zeros_like(hidden_states)
    answers = [
        _answer(self, expert, hidden_states[places // width])
        for expert, places in enumerate(taken.split(tokens_of))
        if len(places)
    ]
    weighted = torch.cat(answers) * top_k_weights.reshape(-1)[taken, None]
    whole = weighted.new_zeros(count * width, weighted.shape[1]).index_copy(0, taken, weighted)
    return whole.view(count, width, -1).sum(1).to(hidden_states.dtype)


def _answer(module: Any, expert: int, inputs: Tensor) -> Tensor:
    """What one expert answers to the tokens that are routed to it, (tokens, hidden)."""

    def multiplied(name: str, values: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        answer: Tensor = getattr(module, name).multiply(expert, values, bias)
        return answer

    first, last = expert_matrices(module)
    inner = multiplied(first, inputs)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = multiplied(last, inner)
    return module.post_expert_norm(outer) if getattr(module, "has_post_expert_norm", False) else outer

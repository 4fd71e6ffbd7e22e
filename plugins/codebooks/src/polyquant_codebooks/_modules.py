"""A linear layer whose weight comes from tables, decoded anew for each product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyquant.plugin.layers import PackedLinear, Part, frozen_linear
from torch import Tensor, float32

from polyquant_codebooks.options import CodebookOptions

KERNEL = "torch decode and matmul"


class CodebookLinear(PackedLinear):
    """y = after(before(x) W'^T) + b, with W' from the stored tensors. A format says what these three are."""

    kernel: ClassVar[str] = KERNEL
    compute_dtype = float32
    """Where PEFT finds it, it makes adapters of this dtype."""

    def __init__(self, linear: Any, tensors: Mapping[str, Tensor], config: CodebookOptions, name: str) -> None:
        """tensors: by their names in a checkpoint, checked. name: of the module, where options differ by it."""
        super().__init__(linear, {_own(stored): tensor for stored, tensor in tensors.items()})
        self.stored = {_own(stored): stored for stored in tensors}
        self.bits, self.scheme = config.bits_of(name), config.scheme
        self.configure(config, name)

    @classmethod
    def parts(
        cls,
        config: CodebookOptions,
        name: str,
        linear: Any,
        tensors: Mapping[str, Tensor],  # noqa: ARG003  of formats whose layers differ by what they hold
    ) -> dict[str, Any]:
        """What the tensors of a layer have to be, its bias left out. Raises ModelError where none would fit."""
        shape = (linear.out_features, linear.in_features)
        return {short: Part(size, dtype) for short, (size, dtype) in config.layout(name, shape).items()}

    def configure(self, config: CodebookOptions, name: str) -> None:
        """Take from the options what decoding needs, and hold the tensors' values against it. Raises ModelError."""

    def inner(self) -> Tensor:
        """W', float32 (out_features, columns)."""
        raise NotImplementedError

    def before(self, input: Tensor) -> Tensor:
        """What is multiplied with W', of (..., in_features)."""
        return input

    def after(self, output: Tensor) -> Tensor:
        """The answer, of a product (..., out_features)."""
        return output

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        output = self.after(frozen_linear(self.before(input), lambda: [self.inner()]))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return self.inner()

    @property
    def qweight(self) -> Tensor:
        """A tensor of its weight: PEFT looks for where a layer is by this name."""
        return next(self.parameters())

    def _of(self, stored: str) -> Tensor:
        """A tensor by its name in checkpoints."""
        return self._parameters[_own(stored)].detach()

    def _has(self, stored: str) -> bool:
        return self._parameters.get(_own(stored)) is not None


def _own(stored: str) -> str:
    """What a tensor is called in a module: a checkpoint's names may have dots."""
    return stored.replace(".", "_") if stored != "weight" else "weight"

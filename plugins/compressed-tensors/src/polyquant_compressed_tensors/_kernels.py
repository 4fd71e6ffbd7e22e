"""int4 layers in the layout of torch's own int4 matmul on CPUs: one pass over the packed weights, nothing unpacked."""

from __future__ import annotations

from functools import partial

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from polyquant.plugin.layers import differentiable, weight_rows

from polyquant_compressed_tensors._decode import ZERO, code_values
from polyquant_compressed_tensors._layers import CompressedLinear, stored_shape

KERNEL = "torch._weight_int4pack_mm_for_cpu"


class Int4PackLinear(CompressedLinear):
    """weight_packed: uint8 (out_features, in_features / 2), torch's order; weight_scale: (groups, out_features, 2).

    Of each pair the first is the scale, the second what is added: 0.
    """

    def __init__(self, layer: CompressedLinear) -> None:
        shape = (layer.out_features, layer.in_features)
        codes = code_values("int4", layer.weight_packed.detach(), torch.float32)[:, : shape[1]].int() + ZERO
        scale = layer.weight_scale.detach()
        bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
        tensors = {
            **bias,
            "weight_packed": torch._convert_weight_to_int4pack_for_cpu(codes, 1),
            "weight_scale": torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous(),
        }
        super().__init__(layer, layer.options, layer.compute_dtype, tensors, layer.packed_scale, layer.matrices)
        self.kernel = KERNEL

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.numel():
            return super().forward(input)
        multiply = partial(self._multiply, scale=self.weight_scale.detach())
        output = differentiable(multiply, input.reshape(-1, self.in_features).contiguous())
        output = output if self.bias is None else output + self.bias
        return output.view(*input.shape[:-1], self.out_features)

    def dequantize(self) -> torch.Tensor:
        scale = self.weight_scale.detach()[:, :, 0].T
        return (self._codes().to(scale.dtype).unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)

    def checkpoint_tensors(self, *, plain: bool) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.detach() for name, tensor in self._tensors()}
        tensors["weight_packed"] = pack_to_int32(self._codes(), 4)
        tensors["weight_scale"] = tensors["weight_scale"][:, :, 0].T.contiguous()
        return {**tensors, "weight_shape": stored_shape(self)}

    def _codes(self) -> torch.Tensor:
        """The weights before scaling, int8: torch's order is its own affair, so they are multiplied out, exactly."""
        ones = torch.zeros_like(self.weight_scale)
        ones[:, :, 0] = 1
        like = ones.new_empty(0, self.in_features)
        with torch.no_grad():
            parts = [rows.to(torch.int8) for rows in weight_rows(partial(self._multiply, scale=ones), like)]
        return torch.cat(parts).T.contiguous()

    def _multiply(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(rows, self.weight_packed, self.options.group_size, scale)

"""What nvidia-modelopt itself makes: run as a script in a process of its own, since it changes transformers.

Arguments: a dense checkpoint, and a folder. There come checkpoints exported on the CPU (fp8, channel, int4), beside each
`reference.safetensors` with the weights that modelopt's own quantizers make of each layer; and `tensors.safetensors`
with what its tensor classes make of some matrices, and what they dequantize that to.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

warnings.simplefilter("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint  # noqa: E402
from modelopt.torch.export.quant_utils import pack_int4_in_uint8  # noqa: E402
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor  # noqa: E402
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

CONFIGS = {"fp8": mtq.FP8_DEFAULT_CFG, "channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "int4": mtq.INT4_AWQ_CFG}
IDS = torch.arange(3, 67).view(2, 32)


def export(dense: Path, name: str, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    mtq.quantize(model, CONFIGS[name], lambda quantized: quantized(IDS))
    reference = {}
    for path, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            scale = getattr(module.input_quantizer, "pre_quant_scale", None)
            weight = quantizer(module.weight)
            reference[path] = (weight if scale is None else weight * scale).detach().contiguous()
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=out / name)
    save_file(reference, out / f"{name}-reference.safetensors")


def tensors() -> dict[str, torch.Tensor]:
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in {"even": (48, 128), "odd": (24, 90), "large": (16, 256)}.items():
        weight = torch.randn(shape, generator=generator) * (3 if name == "large" else 0.05)
        weight[2], weight[3, :32] = 0, 0
        made[f"{name}.weight"] = weight
        quantized, scale, outer = NVFP4QTensor.quantize(weight.clone(), 16)
        dense = (
            quantized.dequantize(torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16})
            if shape[1] % 16 == 0
            else None
        )  # it does not take the padding off again
        made |= {f"{name}.nvfp4.qweight": quantized._quantized_data, f"{name}.nvfp4.scales": scale,
                 f"{name}.nvfp4.outer_scale": outer.view(1)}  # fmt: skip
        if dense is not None:
            made[f"{name}.nvfp4.dense"] = dense
        quantized, scale = MXFP8QTensor.quantize(weight.clone())
        dense = quantized.dequantize(torch.float32, scale=scale)
        made |= {f"{name}.mxfp8.qweight": quantized._quantized_data, f"{name}.mxfp8.scales": scale,
                 f"{name}.mxfp8.dense": dense}  # fmt: skip
    weight = torch.randn(256, 384, generator=generator)
    scales = weight.view(2, 128, 3, 128).abs().amax((1, 3)) / 448
    quantized = FP8QTensor.quantize(weight, scales, block_sizes={-1: 128, -2: 128})[0]
    dense = quantized.dequantize(torch.float32, scale=scales, block_sizes={-1: 128, -2: 128})
    made |= {"block.weight": weight, "block.fp8-block.qweight": quantized._quantized_data,
             "block.fp8-block.scales": scales, "block.fp8-block.dense": dense}  # fmt: skip
    scales = weight.view(256, 3, 128).abs().amax(-1) / 7
    made |= {"block.int4.qweight": pack_int4_in_uint8(weight, scales, 128), "block.int4.scales": scales}
    return {name: tensor.contiguous() for name, tensor in made.items()}


if __name__ == "__main__":
    dense, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), out / "tensors.safetensors")
    for each in CONFIGS:
        export(dense, each, out)
    print(json.dumps("made"))

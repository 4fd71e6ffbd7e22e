"""mlx and mlx-lm on the CPU: what this plugin is held against."""

import json
import shutil

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import dequantize_model, load_model, quantize_model, save_model

mx.set_default_device(mx.cpu)
DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}


def to_mlx(tensor):
    """A tensor as mlx has it; bytes as words."""
    if tensor.dtype == torch.uint8 and tensor.shape[-1] % 4 == 0:
        return mx.array(tensor.view(torch.int32).numpy()).view(mx.uint32)
    return mx.array(tensor.float().numpy()).astype(DTYPES[tensor.dtype])


def to_torch(array):
    """Integers as bytes, floats as they are."""
    if array.dtype in (mx.uint32, mx.uint8):
        return torch.from_numpy(np.array(array)).view(torch.uint8)
    kind = next(torch_dtype for torch_dtype, dtype in DTYPES.items() if dtype == array.dtype)
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(kind)


def logits(model, tokens):
    """mlx-lm's logits, float32 (tokens, vocabulary)."""
    return to_torch(model(mx.array([tokens])).astype(mx.float32))[0]


def greedy(model, tokens, count):
    """The tokens that mlx-lm generates."""
    steps = generate_step(mx.array(tokens), model, max_tokens=count, sampler=lambda scores: mx.argmax(scores, axis=-1))
    return [int(token) for token, _ in steps]


def dense_model(path):
    """mlx-lm's model of a folder that polyquant wrote in MLX's format, without quantization, and its config."""
    model, config = load_model(path)
    return dequantize_model(model), {key: value for key, value in config.items() if not key.startswith("quantization")}


def written_by_mlx_lm(written, out, **options):
    """What mlx-lm quantizes and writes, of a folder that polyquant wrote; and the model."""
    model, config = dense_model(written)
    model, config = quantize_model(model, config, options.pop("group_size", 64), options.pop("bits", 4), **options)
    shutil.copytree(written, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_model(out, model)
    (out / "config.json").write_text(json.dumps(config))
    return model

"""Makes AWQ checkpoints with AutoAWQ."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from polyquant.plugin import LoadRequest, checkpoints, quantized_modules
from polyquant.plugin.calibration import token_windows

from polyquant_autoawq._library import AutoAWQForCausalLM, AwqQuantizer, contained
from polyquant_autoawq.options import AutoawqOptions
from polyquant_autoawq.planning import plan_layers

WINDOW_TOKENS, WINDOWS = 512, 16  # of calibration text, at most; it is cut into windows of 512 again


class Quantizer(AwqQuantizer):
    """The library's search for scales, which on a CPU puts back the scaled weights instead of the original ones.

    It keeps them with `.cpu()`, which copies from a GPU, and on a CPU gives the very tensors that are scaled then:
    every layer is noise after it.
    """

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, linears2scale: Any, fp16_output: Any,
        kwargs: Any = None,
    ) -> Any:  # fmt: skip
        own = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in own().items()}
        try:
            return super()._compute_best_scale(
                x, w_mean, x_mean, module2inspect, linears2scale, fp16_output, kwargs or {}
            )
        finally:
            del module2inspect.state_dict


def quantize(request: LoadRequest, config: AutoawqOptions, calibration: Sequence[str], out: Path) -> Path:
    source, trusted = request.source, request.trust_remote_code
    checkpoints.require_linears(request.weights, config)
    planned = quantized_modules(plan_layers(request.weights, config))
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trusted)
    windows = token_windows(tokenizer, calibration, length=WINDOW_TOKENS, count=WINDOWS)
    length = min(WINDOW_TOKENS, sum(map(len, windows)))  # the library takes whole windows alone: of less text none
    with nullcontext() if request.progress else contained():
        model = AutoAWQForCausalLM.from_pretrained(
            str(source.path), torch_dtype=torch.float32 if request.device == "cpu" else torch.float16,
            trust_remote_code=trusted, device_map={"": "cpu"}, safetensors=True,
        )  # fmt: skip
        # without its search for clipping, which was not tried with the weights put back
        model.quantize(
            tokenizer, quant_config=config.quantize_config(), calib_data=windows, apply_clip=False,
            quantizer_cls=Quantizer, max_calib_samples=WINDOWS, max_calib_seq_len=length,
        )  # fmt: skip
        model.save_quantized(str(out))
    checkpoints.complete(out, source, config.skip, tokenizer)
    checkpoints.require_packed(out, planned, "autoawq")
    return out

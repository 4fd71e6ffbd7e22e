"""What fp_quant's own Triton kernels make of a matrix, interpreted on the CPU: a script, to be run with TRITON_INTERPRET,
which Triton reads when it is imported. Argument: the file to write.
"""

import sys

import torch
from fp_quant.module.linear import get_gsr_matrix, get_hadamard_matrix
from fp_quant.module.triton.mxfp4 import mxfp4_forward_kernel
from fp_quant.module.triton.nvfp4 import nvfp4_forward_kernel
from safetensors.torch import save_file

BLOCK = 1024


def run(kernel, weight: torch.Tensor, rotation: torch.Tensor, **more: object) -> torch.Tensor:
    output = torch.empty_like(weight)
    (kernel.fn if hasattr(kernel, "fn") else kernel)[(weight.numel() // BLOCK,)](
        x_ptr=weight, hadamard_matrix_ptr=rotation, output_ptr=output, n_elements=weight.numel(),
        hadamard_dim=len(rotation), BLOCK_SIZE=BLOCK, **more,
    )  # fmt: skip
    return output


if __name__ == "__main__":
    made = {}
    for size in (16, 32, 128):
        weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(size)) * 0.1
        rotation = get_hadamard_matrix(size, torch.float32, torch.device("cpu"))
        made |= {f"{size}.weight": weight, f"{size}.rotation": rotation}
        made[f"{size}.nvfp4"] = run(nvfp4_forward_kernel, weight, rotation, global_scale_ptr=torch.tensor([10.0]))
        if size >= 32:
            made[f"{size}.mxfp4"] = run(
                mxfp4_forward_kernel, weight, rotation, clip_mask_ptr=None, group_size=32, gaussian_scale=0.75,
                quest=False,
            )  # fmt: skip
    made["gsr"] = get_gsr_matrix(32, torch.float32, torch.device("cpu"))
    save_file(made, sys.argv[1])

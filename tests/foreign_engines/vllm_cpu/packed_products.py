"""Computes packed products with vLLM's own kernels, in Triton's interpreter: packed_products.py IN.safetensors OUT.

In has, for each case, `x` [N, K] float32, `inputs` [N, K] E4M3 and `input_scales` [N, K / 128] (x as Antefix rounds
it), `codes` [O, K] E4M3 and `scales` (E8M0 or float32, one for each 128 x 128). Out has, for each case, vLLM's own
scales of x, and vLLM's product of the given inputs.

vLLM's rounding of x to codes is not taken: Triton's interpreter rounds to E4M3 otherwise than a GPU.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils import fp8_utils

given, out = load_file(sys.argv[1]), {}
for case in sorted({name.partition(".")[0] for name in given}):
    x, inputs, input_scales, codes, scales = (
        given[f"{case}.{name}"] for name in ("x", "inputs", "input_scales", "codes", "scales")
    )
    if scales.dtype is not torch.float32:
        scales = fp8_utils._upcast_e8m0_to_fp32(scales)
    _, own = fp8_utils.per_token_group_quant_fp8(x, 128, use_ue8m0=True)
    out[f"{case}.input_scales"] = own.float().contiguous()
    out[f"{case}.product"] = fp8_utils.w8a8_triton_block_scaled_mm(
        inputs, codes, input_scales, scales, [128, 128], output_dtype=torch.float32
    )
save_file(out, sys.argv[2])

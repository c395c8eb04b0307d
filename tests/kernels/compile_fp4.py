"""Compiles the FP4 product for Hopper, on any machine, and prints the layout on which its conversion to FP8 works.

This is a separate program, because in a test's process Triton's interpreter replaces the kernels.
"""

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from antefix_kernels.packed_fp8_tiles import fp4_kernel

OUTPUTS, ROWS, WORDS = 128, 16, 32
TYPES = {
    "x": "*fp8e4nv", "x_scales": "*fp32", "codes": f"tensordesc<i32[1,{OUTPUTS},{WORDS}]>", "scales": "*i64",
    "out": "*bf16", "experts": "*i32", "firsts": "*i32", "stops": "*i32", "sources": "*i64", "limit": "fp32",
}  # fmt: skip
CHOICES = {
    "ROUTED": True, "GATHERED": False, "PICKED": 6, "GATED": False, "BULK": True, "WIDE": True, "EXACT": False,
    "ASM": True, "N": OUTPUTS, "M": ROWS, "TOGETHER": 8, "STAGES": 3,
}  # fmt: skip


def main() -> None:
    names = fp4_kernel.arg_names
    signature = {name: "constexpr" if name in CHOICES else TYPES.get(name, "i32") for name in names}
    is_wide = [(names.index(name),) for name in names if name.startswith("stride_") or signature[name][0] == "*"]
    source = ASTSource(
        fn=fp4_kernel, signature=signature, constexprs=CHOICES, attrs={at: [["tt.divisibility", 16]] for at in is_wide}
    )
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    for shape in re.findall(r"elementwise_inline_asm .*-> tensor<(\w+)xi8", compiled.asm["ttgir"]):
        print(shape)


if __name__ == "__main__":
    main()

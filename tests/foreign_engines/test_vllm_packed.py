"""Packed products are those of vLLM's kernels, which Triton's interpreter runs on a CPU.

vLLM has kernels of its own for packed weights on CPUs, but only for processors with AMX: a whole model in the released
format does not run elsewhere ("CPUFp8BlockScaledMMKernel requires AMX tile support").
"""

import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from antefix.model.numerics import linear
from antefix.model.packed import PackedMatrix, round_inputs
from tests.foreign_engines import vllm_environment as vllm
from tests.model import released_checkpoint as released

pytestmark = [pytest.mark.engines, pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

CASES = {"e8m0": (200, 384, False), "float32": (129, 640, True)}


@pytest.mark.skipif(bool(vllm.missing()), reason=vllm.missing())
def test_packed_products_are_those_of_vllms_kernels(tmp_path):
    draw, given, want = torch.Generator().manual_seed(5), {}, {}
    for name, (outputs, addends, float_scales) in CASES.items():
        x = torch.randn(5, addends, generator=draw) * 10 ** torch.linspace(-3, 3, 5).unsqueeze(1)
        codes, scales = released.to_fp8(torch.randn(outputs, addends, generator=draw), float_scales=float_scales)
        rounded = round_inputs(x)
        largest = x.view(5, -1, 128).abs().amax(2).clamp(min=1e-4)
        input_scales = torch.exp2(torch.ceil(torch.log2(largest / 448)))
        inputs = (rounded.view(5, -1, 128) / input_scales.unsqueeze(2)).view(5, -1).to(torch.float8_e4m3fn)
        # The codes hold our rounded inputs exactly.
        assert torch.equal((inputs.float().view(5, -1, 128) * input_scales.unsqueeze(2)).view(5, -1), rounded)
        parts = {"x": x, "inputs": inputs, "input_scales": input_scales, "codes": codes, "scales": scales}
        given |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        want[name] = input_scales, linear(x, PackedMatrix(codes, scales, (128, 128)))
    save_file(given, tmp_path / "given")
    program = vllm.SHIM / "packed_products.py"
    subprocess.run(
        [vllm.PYTHON, program, tmp_path / "given", tmp_path / "found"], env=vllm.environment(), check=True, timeout=600
    )
    found = load_file(tmp_path / "found")
    for name, (input_scales, product) in want.items():
        assert torch.equal(found[f"{name}.input_scales"], input_scales)
        assert float((found[f"{name}.product"] - product).norm() / product.norm()) < 1e-6

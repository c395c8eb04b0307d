"""Checkpoints in DeepSeek's released format: what is loaded, how it is computed, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from antefix.errors import ModelError
from antefix.layout import KVFormat
from antefix.model import load_model, probe, save_model
from antefix.model.loading import plan_model
from antefix.model.numerics import grouped_linear, linear
from antefix.model.packed import PackedForm, PackedMatrix, round_inputs
from tests.model import released_checkpoint as released
from tests.model.conftest import lifted
from tests.model.random_models import bits
from tests.model.test_model_against_transformers import run
from tests.slow_cases import slow_but

Release = Callable[[str], Path]


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release's directory, which is written once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = released.write(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def copied(release: Release, tmp_path: Path) -> Path:
    """A private copy of the Flash release, to be damaged."""
    return Path(shutil.copytree(release("flash"), tmp_path / "model"))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite all of a checkpoint's tensors as one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def tokens_of(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, length).astype("<u4")


def dequantised_oracle(directory: Path) -> Any:
    """transformers' own load of the same directory, in float64."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        directory, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    return model.double().eval()


def oracle_logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad(), lifted():
        return model(input_ids=torch.from_numpy(tokens.astype("i8"))[None]).logits[0]


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    assert error < bound, f"relative error {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(released.RELEASES))
def test_a_release_computes_what_transformers_dequantised_load_computes(release: Release, name: str) -> None:
    tokens = tokens_of(300)
    want = oracle_logits(dequantised_oracle(release(name)), tokens)
    model = load_model(release(name), dtype=torch.float64, kv_format=KVFormat.FLOAT64, rounds_inputs=False)
    assert_close(run(model, tokens, [100, 101, 290]), want, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "base"])
def test_inputs_are_rounded_where_the_released_code_rounds_them(release: Release, name: str) -> None:
    """In the oracle each product's inputs are rounded by hand. Experts' weights are applied after the last product."""
    oracle = dequantised_oracle(release(name))
    rounded = ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_proj", "self_attn.o_b_proj",
               "indexer.q_b_proj", "shared_experts.gate_proj", "shared_experts.up_proj",
               "shared_experts.down_proj")  # fmt: skip
    hooked = 0
    for label, module in oracle.named_modules():
        if label.endswith(rounded):
            module.register_forward_pre_hook(lambda _, given: (by_hand(given[0]), *given[1:]))
            hooked += 1
        if label.endswith("mlp.experts"):
            module.forward = lambda *args, experts=module: rounded_experts(experts, *args)
    assert hooked == 5 * 7 + 2
    tokens = tokens_of(40)
    want = oracle_logits(oracle, tokens)
    model = load_model(release(name), dtype=torch.float64, kv_format=KVFormat.FLOAT64)
    # Rounding is a step function. If an input lies at a step, float64's last bit may decide.
    assert_close(run(model, tokens, []), want, 1e-9)
    plain = load_model(release(name), dtype=torch.float64, kv_format=KVFormat.FLOAT64, rounds_inputs=False)
    assert float((run(plain, tokens, []) - want).norm() / want.norm()) > 1e-3


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """act_quant of the released code, group by group. All widths here are multiples of 128."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448))
    return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def rounded_experts(experts: Any, hidden: torch.Tensor, picked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for slot, expert in enumerate(picked[token].tolist()):
            gate, up = (by_hand(hidden[token]) @ experts.gate_up_proj[expert].T).chunk(2)
            inner = torch.nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)
            out[token] += weights[token, slot] * (by_hand(inner) @ experts.down_proj[expert].T)
    return out


FORMS = {
    "fp8": PackedForm(is_fp4=False, block=(128, 128), scale_dtype=torch.float8_e8m0fnu),
    "fp8 float32": PackedForm(is_fp4=False, block=(128, 128), scale_dtype=torch.float32),
    "fp8 small blocks": PackedForm(is_fp4=False, block=(32, 32), scale_dtype=torch.float8_e8m0fnu),
    "fp4": PackedForm(is_fp4=True, block=(1, 32), scale_dtype=torch.float8_e8m0fnu),
}


def matrix(form: PackedForm, rows: int, addends: int) -> tuple[PackedMatrix, torch.Tensor]:
    """A packed matrix, and its values according to the writer's code."""
    drawn = torch.randn(rows, addends, generator=torch.Generator().manual_seed(rows + addends))
    if form.is_fp4:
        codes, scales = released.to_fp4(drawn)
        nibbles = torch.stack((codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4), 2).flatten(1).long()
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        values = table[nibbles] * scales.float().repeat_interleave(32, 1)
        return PackedMatrix(codes.view(torch.uint8), scales, form.block), values
    size = form.block[0]
    codes, scales = released.to_fp8(drawn, float_scales=form.scale_dtype is torch.float32, block=size)
    spread = scales.float().repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :addends]
    return PackedMatrix(codes, scales, form.block), codes.float() * spread


@pytest.mark.parametrize(("rows", "addends"), [(1, 32), (300, 96), (520, 416), (129, 640)])
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_product_is_that_of_the_decoded_weight_to_the_bit(form: str, rows: int, addends: int) -> None:
    packed, values = matrix(FORMS[form], rows, addends)
    assert torch.equal(packed.decode(0, rows, torch.float32), values)
    middle = rows // 3, rows // 3 + max(rows // 2, 1)
    assert torch.equal(packed.decode(*middle, torch.float32), values[slice(*middle)])
    x = torch.randn(37, addends)
    assert torch.equal(linear(x, packed), linear(round_inputs(x), values))
    assert torch.equal(linear(x[5:9], packed), linear(x, packed)[5:9])
    plain = PackedMatrix(packed.codes, packed.scales, packed.block, rounds_inputs=False)
    assert torch.equal(linear(x, plain), linear(x, values))


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_a_packed_product_may_lie_across_blocks(form: str) -> None:
    packed, values = matrix(FORMS[form], 3 * 72, 64)
    x = torch.randn(5, 3, 64)
    plain = PackedMatrix(packed.codes, packed.scales, packed.block, rounds_inputs=False)
    assert torch.equal(grouped_linear(x, plain), grouped_linear(x, values))


def test_every_code_has_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    fp8 = PackedMatrix(codes.view(torch.float8_e4m3fn).view(1, 256), torch.ones(1, 2), (128, 128))
    want = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8.decode(0, 1, torch.float32)[0].nan_to_num(7.5), want.nan_to_num(7.5))
    # The smallest and largest scale: 2^-127, which is a subnormal number in float32, and 2^127.
    ends = torch.tensor([[0, 254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    fp4 = PackedMatrix(torch.full((1, 32), 0x42, dtype=torch.uint8), ends, (1, 32))
    assert fp4.decode(0, 1, torch.float64)[0, [0, 1, 32, 33]].tolist() == [
        2.0**-127, 2.0**-126, 2.0**127, float("inf"),
    ]  # fmt: skip


def test_weights_stay_packed_in_memory(release: Release) -> None:
    model = load_model(release("flash"))
    stored = sum(file.stat().st_size for file in release("flash").glob("*.safetensors"))
    plan = plan_model(release("flash"))[1]
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert plan.nbytes < stored
    # In a float32 model BF16 tensors become float32. Packed tensors, most of a real model's bytes, stay packed.
    packed = [tensor for name, tensor in model.state_dict().items() if name.endswith(".codes")]
    assert {tensor.dtype for tensor in packed} == {torch.uint8, torch.float8_e4m3fn}
    assert held <= 2 * plan.nbytes


def test_float32_tensors_keep_their_bits_in_a_bfloat16_model(release: Release) -> None:
    """Sinks, hyper-connections, position biases and routing biases stay as released, as in transformers."""
    wide, narrow = load_model(release("flash")), load_model(release("flash"), dtype=torch.bfloat16)
    kept = [name for name, tensor in narrow.state_dict().items() if tensor.dtype is torch.float32]
    kept = [name for name in kept if not name.endswith(".scales")]
    assert len(kept) == 5 * 6 + 5 + 5 + 4 + 3  # hc, sinks, position biases (two in CSA), routing biases, head
    assert all(torch.equal(narrow.state_dict()[name], wide.state_dict()[name]) for name in kept)
    assert all(
        not torch.equal(narrow.state_dict()[name], narrow.state_dict()[name].bfloat16().float()) for name in kept
    )
    assert torch.isfinite(run(narrow, tokens_of(20), [3])).all()


@pytest.mark.parametrize("name", slow_but(["flash"], sorted(released.RELEASES)))
def test_hits_do_not_depend_on_cuts_or_batches(release: Release, name: str) -> None:
    model = load_model(release(name))
    whole = bits(model)
    assert bits(model, (1, 17, 40)) == whole
    assert bits(model, others=2) == whole


@pytest.mark.slow
def test_names_tell_packed_from_decoded_and_rounded_from_plain(release: Release) -> None:
    flash, base = load_model(release("flash")), load_model(release("base"))
    names = {probe(flash).name, probe(base).name, probe(load_model(release("flash"), rounds_inputs=False)).name}
    assert len(names) == 3
    # Another layer of the same shapes computes the same way.
    assert probe(load_model(release("dspark"))).name in names


@pytest.mark.parametrize("name", ["layers.1.attn.wq_a", "layers.2.ffn.experts.3.w2", "layers.0.ffn.shared_experts.w1"])
def test_packed_weights_without_scales_are_refused_by_name(copied: Path, name: str) -> None:
    edit(copied, lambda tensors: tensors.pop(f"{name}.scale"))
    with pytest.raises(ModelError, match=rf"tensor {name}.weight has type (F8_E4M3|I8) and no scales: {name}.scale"):
        load_model(copied)


def test_float8_weights_of_a_config_that_says_nothing_of_them_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has type (F8_E4M3|I8), but the config has no quantization_config"):
        load_model(copied)


SCALE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1.attn.wq_a.scale": torch.ones(2, 1)}, r"wq_a.scale has shape \[2, 1\], the config asks"),
        ({"layers.1.attn.wq_a.scale": SCALE.half()}, "wq_a.scale has type F16; scales are F8_E8M0 or F32"),
        ({"layers.1.attn.wq_a.scale": SCALE * float("nan")}, "scales of .*wq_a.weight hold NaN"),
        ({"layers.1.attn_norm.scale": SCALE}, "unexpected tensor layers.1.attn_norm.scale: no packed weight"),
        ({"layers.9.attn.wq_a.scale": SCALE}, "unexpected tensor layers.9.attn.wq_a.scale"),
        ({"layers.1.attn.attn_sink": torch.ones(4).to(torch.float8_e4m3fn)}, "it must not be packed"),
        ({"embed.weight": torch.ones(64, 128).to(torch.float8_e4m3fn)}, "embed.weight .* it must not be packed"),
        ({"layers.1.attn.wq_a.weight": torch.ones(128, 128).to(torch.float8_e5m2)}, "F8_E5M2, but it must not be"),
        ({"layers.1.attn.wq_a.weight": torch.ones(128, 128, dtype=torch.int16)}, "has type I16; only floating point"),
        ({"layers.2.ffn.experts.1.w1.weight": SCALE.to(torch.int8)}, r"w1.weight has shape \[1, 1\]"),
        ({"layers.0.ffn.gate.tid2eid": torch.ones(64, 2)}, "has type F32; a table of experts has I64 or I32"),
        ({"model.layers.1.attn.wq_a.scale": SCALE}, "are two names of one weight"),
        ({"mtp.0.attn.unheard_of": SCALE}, "unexpected tensor mtp.0.attn.unheard_of"),
        ({"mtp.0.attn.indexer.wq_b.weight": SCALE}, "unexpected tensor mtp.0.attn.indexer.wq_b.weight"),
        ({"layers.1.engram.embed.weight": SCALE}, "unexpected tensor layers.1.engram.embed.weight"),
    ],
)  # fmt: skip
def test_what_a_release_does_not_have_is_refused_by_name(
    copied: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    edit(copied, lambda tensors: tensors.update(changes))
    with pytest.raises(ModelError, match=message):
        load_model(copied)


def test_experts_that_are_packed_in_two_ways_are_refused(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "layers.2.ffn.experts.1.w2"
        codes, scales = released.to_fp8(torch.randn(128, 128))
        tensors.update({f"{name}.weight": codes, f"{name}.scale": scales})

    edit(copied, change)
    with pytest.raises(ModelError, match=r"experts.1.w2.weight is fp8 128x128 e8m0, others .* are fp4 1x32 e8m0"):
        load_model(copied)


def test_experts_whose_products_are_packed_in_two_ways_are_refused(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(4):
            name = f"layers.2.ffn.experts.{expert}.w2"
            codes, scales = released.to_fp8(torch.randn(128, 128))
            tensors.update({f"{name}.weight": codes, f"{name}.scale": scales})

    edit(copied, change)
    with pytest.raises(ModelError, match=r"layers.2.mlp.experts: w1 and w3 are fp4 1x32 e8m0, w2 is fp8 128x128 e8m0"):
        load_model(copied)


def test_some_linears_may_come_dequantised(copied: Path) -> None:
    """transformers and vLLM accept a checkpoint whose config says fp8 although some weights are not packed."""
    name, before = "layers.1.attn.wq_a", run(load_model(copied, rounds_inputs=False), tokens_of(20), [])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() * tensors.pop(f"{name}.scale").float()

    edit(copied, change)
    assert torch.allclose(run(load_model(copied, rounds_inputs=False), tokens_of(20), []), before, 1e-5, 1e-5)


def test_transformers_spelling_of_scales_is_read(copied: Path) -> None:
    before = load_model(copied).state_dict()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".scale")]:
            tensors[f"{name.removesuffix('scale')}weight_scale_inv"] = tensors.pop(name)

    edit(copied, change)
    after = load_model(copied).state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in before.items())


def test_a_file_that_is_cut_short_is_named_before_anything_is_read(copied: Path) -> None:
    file = sorted(copied.glob("*.safetensors"))[1]
    data = file.read_bytes()
    for size in (len(data) - 1, 100, 8, 3, 0):
        file.write_bytes(data[:size])
        with pytest.raises(ModelError, match=f"cannot read .*{file.name}"):
            load_model(copied)
    file.write_bytes(data + b"\0")
    with pytest.raises(ModelError, match=f"{file.name}: it has {len(data) + 1} bytes, but its header describes"):
        load_model(copied)


def test_an_index_that_does_not_fit_its_files_is_refused(copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    name, file = next((n, f) for n, f in given["weight_map"].items() if n.endswith("wq_a.weight"))
    other = next(f for f in given["weight_map"].values() if f != file)
    index.write_text(json.dumps(given | {"weight_map": given["weight_map"] | {name: other}}))
    with pytest.raises(ModelError, match=f"tensor {name} is in {file}, not in {other} as"):
        load_model(copied)
    index.write_text(json.dumps(given | {"weight_map": given["weight_map"] | {"layers.0.more": file}}))
    with pytest.raises(ModelError, match=f"layers.0.more is missing: .* says that {file} has it"):
        load_model(copied)


def test_progress_ends_at_the_bytes_that_are_read(release: Release) -> None:
    seen: list[tuple[int, int]] = []
    load_model(release("flash"), progress=lambda done, total: seen.append((done, total)))
    total = plan_model(release("flash"))[1].nbytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_packed_models_are_not_written(release: Release, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="packed weights are not written"):
        save_model(load_model(release("flash")), tmp_path, config=released.FLASH)


# A model of 12 files of 4 MB each.
MEASURE = """
import resource, sys, torch
from antefix.model import load_model
from antefix.model import read_spans
read_spans.SPAN_BYTES = 1 << 20
load_model(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(peak * 1024, held)
"""


@pytest.mark.services
def test_a_load_takes_the_model_and_at_most_two_files_of_memory(release: Release, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 16, "o_lora_rank": 512}
    path = released.write("flash", tmp_path / "wide", num_shards=12, **wide)
    files = [file.stat().st_size for file in path.glob("*.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(release("flash")), str(path)], check=True, capture_output=True, text=True
    )
    peak, held = map(int, done.stdout.split())
    assert len(files) == 12
    assert sum(files) > 6 * max(files)
    assert peak < held + 2 * max(files)

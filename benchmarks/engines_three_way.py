"""Runs one small V4 model in Antefix, transformers and vLLM on one prompt, and compares the stored KV entry by entry:

    python benchmarks/engines_three_way.py [--vllm .engines/vllm/bin/python] [--json FILE]

The model has head dim 512 and random BF16 weights. The script prints a table for each pair of engines: where entries
differ, and why. vLLM runs on a CPU with the shim of tests/foreign_engines/vllm_cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import antefix_kvstore

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from antefix import BlockingStore  # noqa: E402
from antefix.layout import BlockLayout, KVFormat, KVGeometry  # noqa: E402
from antefix.model import Model, ModelConfig, save_model  # noqa: E402
from antefix.model_dir import read_config  # noqa: E402
from antefix.record import RecordKind  # noqa: E402
from antefix.store_files.record_format import (  # noqa: E402
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    SEGMENT_DIR,
    STORE_FILE,
    unpack_identity,
)
from antefix.store_files.record_header import unpack_record_header  # noqa: E402
from antefix_engines.v4_entries import StoredV4, compare  # noqa: E402
from antefix_engines.v4_runs import antefix_entries, transformers_entries  # noqa: E402
from antefix_engines.vllm.check_models import COMMON, V4, antefix_tier, llm_arguments  # noqa: E402
from antefix_engines.vllm.entries import of_vllm  # noqa: E402
from antefix_engines.vllm.run_prompts import MARK  # noqa: E402
from antefix_engines.vllm.shape import Group, Shape  # noqa: E402
from antefix_engines.vllm.v4_pages import V4Pages  # noqa: E402
from benchmarks.engine_entries import show  # noqa: E402
from benchmarks.run_record import write  # noqa: E402

# From Antefix's module names to the names in the releases, for tensors where `save_model` keeps transformers' names.
RELEASED: Final = {"hc_head.hc_": "hc_head_", "embed_tokens.": "embed.", ".attn.norm.": ".attn.kv_norm."}
FLOAT32: Final = ("hc_", "attn_sink", "ape", "gate.bias")


def write_checkpoint(directory: Path) -> Path:
    """Write model files with the released names, which all three engines read."""
    config = COMMON | V4.config
    model = Model(ModelConfig.from_dict(config), kv_format=KVFormat.FP8).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        near_one = "norm" in name or name.endswith("scale")
        weight.copy_((1 + 0.2 * drawn if near_one else drawn * weight.shape[-1] ** -0.5).to(torch.bfloat16).float())
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(len(table), 256, generator=generator).argsort(-1)[:, : table.shape[1]])
        elif name.endswith("bias"):
            table.zero_()
    save_model(model, directory, config=config)
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            released = name.removeprefix("model.")
            for ours, theirs in RELEASED.items():
                released = released.replace(ours, theirs)
            is_exact = not tensor.is_floating_point() or any(part in released for part in FLOAT32)
            tensors[released] = (tensor if is_exact else tensor.to(torch.bfloat16)).contiguous()
        path.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def run_vllm(python: Path, directory: Path, data: Path, tokens: list[int]) -> StoredV4:
    """Run vLLM, and read from its store the KV that it stored."""
    llm = llm_arguments(replace(V4, config={}), directory, [antefix_tier(data, weights_revision="three-way")])
    step = {"do": "run", "name": "cold", "prompts": [tokens], "num_tokens": 1, "is_cold": True, "is_stored": True}
    roots = ("billing", "console", "decode", "engines", "kernels", "kvstore", "prefill", "router", "simulate")
    paths = [ROOT / "tests" / "foreign_engines" / "vllm_cpu", ROOT, *(ROOT / root for root in roots)]
    done = subprocess.run(
        [str(python), "-m", "antefix_engines.vllm.run_prompts"],
        input=json.dumps({"llm": llm, "steps": [step]}),
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    if MARK not in done.stdout:
        raise SystemExit(f"vLLM failed: {done.stderr[-2000:]}")
    own = BlockLayout(geometry=KVGeometry.from_config(read_config(directory)), kv_format=KVFormat.FP8)
    return of_vllm(own, small_pages(), *read_store(data, len(tokens) // 256 * 256))


def read_store(data: Path, end: int) -> tuple[list[bytes], bytes]:
    """Payloads of the prompt's blocks up to `end`, in order, and the payload of the window at `end`."""
    seed = unpack_identity((data / "store" / STORE_FILE).read_bytes()).seed
    headers = {}
    for path in (data / "store" / SEGMENT_DIR).glob("*.seg"):
        raw, at = path.read_bytes(), -1
        while (at := raw.find(RECORD_MAGIC, at + 1)) >= 0:
            header = unpack_record_header(raw[at : at + RECORD_HEADER_BYTES], seed)
            headers[header.kind, header.position] = header
    with BlockingStore(antefix_kvstore.open(data / "store", budget_bytes="2G")) as store:

        def get(kind: RecordKind, position: int) -> bytes:
            header = headers[kind, position]
            payload = store.get(kind, header.hash, fingerprint=header.fingerprint)
            assert payload is not None
            return payload

        return [get(RecordKind.BLOCK, at) for at in range(256, end + 1, 256)], get(RecordKind.CHECKPOINT, end)


def small_pages() -> V4Pages:
    """The small model's cache pages, as vLLM's planner lays them out."""
    from tests.foreign_engines.vllm_stand_in import TINY_V4, TINY_V4_ROW

    shape = Shape(
        groups=tuple(Group(id=each.id, num_tokens=each.num_tokens, layers=each.layers) for each in TINY_V4),
        cell_bytes=TINY_V4_ROW,
        num_cells=1,
        row_stride=94208,
        blocks_per_row=1,
        dtype="fp8_ds_mla",
        layout="BLHNC",
        model="",
        tokens_per_hash=4,
        tp_size=1,
        is_cut_otherwise=False,
        is_replicated=False,
        is_one_whole=False,
    )
    pages = V4Pages.of(shape, compact=True)
    assert pages is not None
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=ROOT / ".engines" / "vllm" / "bin" / "python")
    parser.add_argument("--tokens", type=int, default=520)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = np.random.default_rng(3).integers(2, 1024, args.tokens).tolist()
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
        directory = write_checkpoint(Path(scratch) / "model")
        vllm = run_vllm(args.vllm, directory, Path(scratch) / "data", tokens)
        ours = antefix_entries(directory, tokens, KVFormat.FP8)
        theirs = transformers_entries(directory, tokens, Path(scratch) / "store")
    report = {}
    for one, other in ((ours, vllm), (vllm, theirs), (ours, theirs)):
        show(one, other, f"{one.engine} against {other.engine}, {one.num_tokens} tokens")
        report[f"{one.engine} against {other.engine}"] = [asdict(each) for each in compare(one, other)]
    if args.json:
        write(args.json, {"tokens": args.tokens, "pairs": report}, "torch", "transformers")


if __name__ == "__main__":
    main()

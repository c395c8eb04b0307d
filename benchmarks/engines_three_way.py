"""One small V4 checkpoint run by Antefix's model, by transformers and by vLLM on one prompt; what they store, entry by
entry:

    python benchmarks/engines_three_way.py [--vllm .engines/vllm/bin/python] [--json FILE]

Head dim 512, random BF16 weights, 520 tokens in chunks of 512 and 8. Antefix's and vLLM's entries are records of 584
bytes (448 FP8 codes, 64 BF16, 8 scales), compared byte by byte and as numbers; transformers keeps numbers as they come,
compared with both. For each layer and kind: the share of equal records and bytes, and by how much the numbers differ
(mean and largest). vLLM runs on a CPU with the shim of tests/foreign_engines/vllm_cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from antefix import BlockingStore  # noqa: E402
from antefix.layout import KVFormat  # noqa: E402
from antefix.model import BlockPool, Model, ModelConfig, Sequence, WindowState, forward, save_model  # noqa: E402
from antefix.record import RecordKind  # noqa: E402
from antefix.store_files.record_format import (  # noqa: E402
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    SEGMENT_DIR,
    STORE_FILE,
    unpack_identity,
)
from antefix.store_files.record_header import unpack_record_header  # noqa: E402
from antefix_engines.engine_layout import views_of  # noqa: E402
from antefix_engines.vllm.check_models import _COMMON, _V4, antefix_tier, llm_arguments  # noqa: E402
from antefix_engines.vllm.run_prompts import MARK  # noqa: E402
from antefix_engines.vllm.shape import Group, Shape  # noqa: E402
from antefix_engines.vllm.v4_pages import V4Pages  # noqa: E402

NUM_TOKENS: Final = 520
CHUNK: Final = 512
ENTRY, CODES, ROPE = 584, 448, 128
# What Antefix's module names are called in the releases, where `save_model` keeps transformers' names.
RELEASED: Final = {"hc_head.hc_": "hc_head_", "embed_tokens.": "embed.", ".attn.norm.": ".attn.kv_norm."}
FLOAT32: Final = ("hc_", "attn_sink", "ape", "gate.bias")


def write_checkpoint(directory: Path) -> Path:
    """A checkpoint with released names that all three read."""
    config = _COMMON | _V4
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


def run_antefix(directory: Path, tokens: list[int]) -> dict[tuple[int, str], np.ndarray]:
    """Records by layer and kind: [entries, bytes]."""
    from antefix.model import load_model

    model = load_model(directory, kv_format=KVFormat.FP8)
    size = model.layout.geometry.block_size
    num_blocks = -(-len(tokens) // size)
    pool = BlockPool(model.layout, num_blocks)
    sequence = Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0))
    for first in range(0, len(tokens), CHUNK):
        forward(model, pool, [(sequence, tokens[first : first + CHUNK])])
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    for block in sequence.block_table[: CHUNK // size]:
        payload = np.frombuffer(pool.payloads([block])[0], np.uint8)
        for part in model.layout.parts:
            rows = payload[part.offset : part.offset + part.nbytes].reshape(part.num_rows, -1)
            found.setdefault((part.layer, str(part.kind)), []).append(rows.copy())
    return {name: np.concatenate(rows) for name, rows in found.items()}


def run_transformers(directory: Path, tokens: list[int]) -> dict[tuple[int, str], np.ndarray]:
    """Numbers by layer and kind: [entries, head dim]."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([tokens[:CHUNK]]), past_key_values=cache, use_cache=True)
    found = {}
    for number, layer in enumerate(cache.layers):
        for name, entries in getattr(layer, "compressed_kv", {}).items():
            kind = "indexer_keys" if name == "indexer" else "csa_main" if hasattr(layer, "overlap_kv") else "hca_main"
            found[number, kind] = entries[0].float().numpy()
    return found


def run_vllm(python: Path, directory: Path, data: Path, tokens: list[int]) -> dict[tuple[int, str], np.ndarray]:
    """Records by layer and kind, out of the store that vLLM wrote."""
    from dataclasses import replace

    from antefix_engines.vllm.check_models import V4

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
    return read_vllm(data)


def read_vllm(data: Path) -> dict[tuple[int, str], np.ndarray]:
    """The blocks' parts, in the order of the prompt."""
    import antefix_kvstore

    pages = small_pages()
    headers = {}
    seed = unpack_identity((data / "store" / STORE_FILE).read_bytes()).seed
    for path in (data / "store" / SEGMENT_DIR).glob("*.seg"):
        raw, at = path.read_bytes(), -1
        while (at := raw.find(RECORD_MAGIC, at + 1)) >= 0:
            header = unpack_record_header(raw[at : at + RECORD_HEADER_BYTES], seed)
            if header.kind is RecordKind.BLOCK and header.position <= CHUNK:
                headers[header.position] = header
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    with BlockingStore(antefix_kvstore.open(data / "store", budget_bytes="2G")) as store:
        for position in sorted(headers):
            header = headers[position]
            payload = store.get(RecordKind.BLOCK, header.hash, fingerprint=header.fingerprint)
            halves: dict[tuple[int, str], list[np.ndarray]] = {}
            for part, view in views_of(memoryview(payload), pages.layout.block):
                rows = np.frombuffer(view, np.uint8).reshape(part.num_rows, -1)
                halves.setdefault((part.layer, str(part.group)), []).append(rows)
            for name, parts in halves.items():
                found.setdefault(name, []).append(np.concatenate(parts, axis=1))
    return {name: np.concatenate(rows) for name, rows in found.items()}


def small_pages() -> V4Pages:
    """The small model's pages, as vLLM plans them."""
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


def numbers_of(records: np.ndarray) -> np.ndarray:
    """Records of 584 bytes as numbers."""
    raw = torch.from_numpy(records.copy())
    scales = torch.exp2(raw[:, CODES + ROPE : CODES + ROPE + 7].float() - 127).repeat_interleave(64, 1)
    nope = raw[:, :CODES].view(torch.float8_e4m3fn).float() * scales
    rope = raw[:, CODES : CODES + ROPE].contiguous().view(torch.bfloat16).float()
    return torch.cat((nope, rope), 1).numpy()


def compared(ours: Any, hf: Any, vllm: Any) -> list[dict[str, Any]]:
    rows = []
    for name in sorted(ours):
        row: dict[str, Any] = {"layer": name[0], "kind": name[1], "entries": len(ours[name])}
        if name[1] != "indexer_keys":
            a, b = numbers_of(ours[name]), numbers_of(vllm[name])
            row["equal_records"] = round(float((ours[name] == vllm[name]).all(1).mean()), 4)
            row["equal_bytes"] = round(float((ours[name] == vllm[name]).mean()), 4)
            row["antefix_vllm"] = share(a, b)
            if name in hf:
                row["antefix_transformers"], row["vllm_transformers"] = share(a, hf[name]), share(b, hf[name])
        rows.append(row)
    return rows


def share(one: np.ndarray, other: np.ndarray) -> list[float]:
    """The mean difference as a share of the mean number, and the largest as a share of the largest number."""
    apart, size = np.abs(one - other), np.abs(one)
    return [round(float(apart.mean() / size.mean()), 4), round(float(apart.max() / size.max()), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=ROOT / ".engines" / "vllm" / "bin" / "python")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    tokens = np.random.default_rng(3).integers(2, 1024, NUM_TOKENS).tolist()
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
        directory = write_checkpoint(Path(scratch) / "model")
        vllm = run_vllm(args.vllm, directory, Path(scratch) / "data", tokens)
        ours = run_antefix(directory, tokens)
        hf = run_transformers(directory, tokens)
    report = compared(ours, hf, vllm)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

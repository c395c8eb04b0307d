"""How fast does a directory in the released format load onto a GPU, and how much host memory does that take?

    python -m benchmarks.loading_on_card --layers 12 --out results

Draws `--layers` layers of V4-Flash's width on the GPU, writes them as a release does (one file per layer, and one for
the rest), and loads the directory twice: with the files dropped from the page cache, and from the page cache. 12 layers
are 45 GB and take about 100 s. Each rate is divided by the rates at which this disk gives the same files to direct
reads: of 1 MiB one after another, and of 8 MiB by eight threads at once. Peak host memory is the process' largest
resident size during the load minus its size before, sampled every 20 ms.

Writes loading_on_card.json after every row. `--toy` runs everything at small widths, with `--device cpu` too.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from antefix.model import Model, load_model
from antefix.model.names import checkpoint_name, expert_name
from benchmarks import run_record
from benchmarks.drawn_flash import config_of, draw_share
from benchmarks.store_limits import drop_cache

# Enough for a steady rate, little enough to take two seconds.
DIRECT_BYTES = 2 << 30
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def write(model: Model, directory: Path, *, toy: bool = False) -> int:
    """Write the model like a release: one file per layer, and one for the rest. Returns the number of bytes of all
    tensors.
    """
    (directory / "config.json").write_text(json.dumps(config_of(model.config.num_layers, toy=toy)))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    weight_map: dict[str, str] = {}
    nbytes = 0
    for name, tensor in model.state_dict().items():
        shard = f"layer-{name.split('.')[2]}" if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"{shard}.safetensors", {}).update(released_tensors(name, tensor))
    for file, tensors in shards.items():
        on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_host, directory / file)
        weight_map |= dict.fromkeys(on_host, file)
        nbytes += sum(tensor.numel() * tensor.element_size() for tensor in on_host.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return nbytes


def released_tensors(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    owner, _, own = name.rpartition(".")
    if own not in ("codes", "scales"):
        return {checkpoint_name(name): tensor}
    suffix = "weight" if own == "codes" else "scale"
    if not owner.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return {f"{checkpoint_name(owner + '.weight').removesuffix('weight')}{suffix}": tensor}
    parts = (2,) if owner.endswith("down_proj") else (1, 3)
    found = {}
    for expert, matrix in enumerate(tensor):
        for part, piece in zip(parts, matrix.chunk(len(parts)), strict=True):
            piece = piece.view(torch.int8) if own == "codes" and piece.dtype is torch.uint8 else piece
            found[f"{expert_name(owner, expert, part).removesuffix('weight')}{suffix}"] = piece
    return found


def direct_rate(directory: Path, *, piece: int, threads: int) -> float:
    """Bytes per second at which direct reads get the directory's weights, without the page cache."""
    spans = [(path, offset) for path in sorted(directory.glob("*.safetensors"))
             for offset in range(0, path.stat().st_size - piece, piece)][: DIRECT_BYTES // piece]  # fmt: skip
    if not spans:
        return 0.0
    with ThreadPoolExecutor(threads) as readers:
        started = time.perf_counter()
        read = sum(readers.map(lambda span: _read_direct(*span, piece), spans))
        return read / (time.perf_counter() - started)


def _read_direct(path: Path, offset: int, piece: int) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # some file systems have no direct reads
        descriptor = os.open(path, os.O_RDONLY)
    with mmap.mmap(-1, piece) as buffer:
        try:
            return os.preadv(descriptor, [buffer], offset)
        finally:
            os.close(descriptor)


class PeakMemory:
    """The largest number of bytes that this process held in memory within the context."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def measure(args: argparse.Namespace, found: dict[str, Any], save: Any) -> None:
    settings: dict[str, Any] = {"ranks": None, "device": args.device, "num_layers": args.layers, "toy": args.toy}
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory(dir=args.data_dir) as where:
        directory = Path(where)
        started = time.perf_counter()
        nbytes = write(draw_share(**settings, dtype=dtype), directory, toy=args.toy)
        _free(args.device)
        drop_cache(directory)
        shards = sorted(path.stat().st_size for path in directory.glob("*.safetensors"))
        found |= {"gb": nbytes / 1e9, "write_s": time.perf_counter() - started, "largest_file_gb": shards[-1] / 1e9}
        for name, piece, threads in (("direct_1_mib", 1 << 20, 1), ("direct_8_mib_by_8", 8 << 20, 8)):
            found[f"{name}_gb_per_s"] = direct_rate(directory, piece=piece, threads=threads) / 1e9
        save({key: found[key] for key in found if key != "rows"})
        for label in ("disk", "page cache"):
            if label == "disk":
                drop_cache(directory)
            with PeakMemory() as memory:
                started = time.perf_counter()
                loaded = load_model(directory, device=args.device, dtype=dtype)
                _free(args.device)
                seconds = time.perf_counter() - started
            row = {"from": label, "s": seconds, "gb_per_s": nbytes / seconds / 1e9}
            row |= {"host_gb_peak": (memory.peak - memory.before) / 1e9}
            found["rows"].append(row)
            save(row)
            del loaded
            _free(args.device)


def _free(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="use small tensor widths, to see whether the benchmark runs")
    parser.add_argument("--data-dir", help="directory for the weights (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"layers": args.layers, "toy": args.toy, "rows": []}

    def save(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        run_record.write(args.out / "loading_on_card.json", found, "torch")

    with torch.inference_mode():
        measure(args, found, save)


if __name__ == "__main__":
    main()

"""A process's set-up: its processor or GPU, its libraries, and those of their settings that are known to
change bits.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

# Environment variables that MKL, oneDNN, OpenMP and PyTorch read themselves. No command-line option of ours sets them.
_PREFIXES: Final = ("MKL_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "ATEN_", "CUBLAS", "NVIDIA_TF32", "TORCH_", "TRITON_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """processor: model and instruction sets.  libraries: versions and builds.  card: empty on a CPU.

    variables: environment variables as "NAME=value".
    """

    processor: str
    libraries: str
    threads: int
    variables: tuple[str, ...] = ()
    card: str = ""

    @property
    def text(self) -> str:
        """The set-up as text, for people who compare two set-ups whose bits differ."""
        where = self.card or self.processor.partition(";")[0]
        return ", ".join((where, self.libraries.partition("\n")[0], f"{self.threads} threads", *self.variables))


def setup_of(device: torch.device) -> Setup:
    return Setup(
        processor=_processor(),
        libraries=_libraries(),
        threads=torch.get_num_threads(),
        variables=tuple(sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_PREFIXES))),
        card=_card(device) if device.type == "cuda" else "",
    )


@functools.cache
def _processor() -> str:
    """The first processor: its model and the path that PyTorch takes on it; after a semicolon, its instruction sets."""
    fields = {"model name": platform.processor() or platform.machine(), "microcode": "", "flags": ""}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().partition("\n\n")[0].splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{fields['model name']} ({capability}); {fields['microcode']} {fields['flags']}"


@functools.cache
def _libraries() -> str:
    return f"torch {torch.__version__}\n{torch.__config__.show()}"


def _card(device: torch.device) -> str:
    """The GPU's model, its driver, and the versions that the kernels are built with."""
    properties = torch.cuda.get_device_properties(device)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    capability = f"{properties.major}.{properties.minor}"
    path = Path("/proc/driver/nvidia/version")
    driver = path.read_text().splitlines()[0] if path.is_file() else "unknown driver"
    return f"{properties.name} {capability}, {driver}, CUDA {torch.version.cuda}, Triton {triton}"

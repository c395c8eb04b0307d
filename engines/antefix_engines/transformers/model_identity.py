"""Everything besides tokens that a transformers model's KV depends on: weights, config, adapters, hardware and
software.

Weights are hashed once per model, and again only when a tensor was replaced or written to. PyTorch counts writes to
tensors, except those through `.data`, which the caller must report (`forget`). Four threads hash about 1 GB/s each.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from antefix.errors import InvalidRequest

_NUM_THREADS: Final = 4
# Config fields that say where the config comes from or how the model runs, never what it computes (see
# `arithmetic_of`).
_NOT_COMPUTED: Final = frozenset(
    (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "id2label",
        "label2id",
    )
)
_known: Final[weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]]] = weakref.WeakKeyDictionary()
_lock: Final = threading.Lock()


def revision_of(model: nn.Module, weights_revision: str = "") -> str:
    """32 hex digits for weights, config and active adapters. weights_revision: used instead of hashing the weights.

    Raises:  InvalidRequest: weights that are not in memory, and no revision was given.
    """
    weights = weights_revision or _weights_digest(model)
    text = json.dumps([weights, _config_of(model), _adapters_of(model)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"antefix-hfmodel").hexdigest()


def forget(model: nn.Module) -> None:
    """Make the weights be hashed again at the next call, after they were written to through `.data`."""
    with _lock:
        _known.pop(model, None)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first weights."""
    return next(model.parameters()).device


def arithmetic_of(model: Any) -> str:
    """All facts that are known to change last bits: versions, device, dtype, kernels, threads, settings."""
    device = device_of(model)
    where = f"{torch.backends.cpu.get_cpu_capability()}-t{torch.get_num_threads()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device).replace(" ", "_") + f"-tf32:{torch.backends.cuda.matmul.allow_tf32}"
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else "no"
    config = model.config.get_text_config(decoder=True)
    kernels = [getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")]
    settings = {
        "autocast": autocast,
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "compiled": getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"),
    }
    said = ",".join(f"{name}:{value}" for name, value in settings.items())
    versions = f"transformers-{transformers.__version__}-torch-{torch.__version__}"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{versions}-{device.type}-{where}-{dtype}-{'/'.join(map(str, kernels))}-{said}"


def _weights_digest(model: nn.Module) -> str:
    tensors = _tensors_of(model)
    state = tuple((name, id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors)
    with _lock:
        known = _known.get(model)
    if known is not None and known[0] == state:
        return known[1]
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-weights") as threads:
        digests = list(threads.map(_tensor_digest, tensors))
    digest = hashlib.blake2b(b"".join(digests), digest_size=16, person=b"antefix-weights").hexdigest()
    with _lock:
        _known[model] = (state, digest)
    return digest


def _tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, including those that are not saved with the weights, such as frequencies of positions."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise InvalidRequest(
                f"parameter {name} is not in memory, so its values cannot be hashed: give weights_revision"
            )
    return sorted(tensors, key=lambda each: each[0])


def _tensor_digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    flat = tensor.detach().contiguous().reshape(-1)
    state = hashlib.blake2b(digest_size=16, person=b"antefix-weights")
    state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
    if flat.numel():
        state.update(flat.view(torch.uint8).cpu().numpy().data)
    return state.digest()


def _config_of(model: Any) -> dict[str, Any]:
    said = model.config.get_text_config(decoder=True).to_dict()
    return {name: value for name, value in said.items() if name not in _NOT_COMPUTED}


def _adapters_of(model: nn.Module) -> list[Any]:
    """The active PEFT adapters and their strengths, which are not among the parameters."""
    found = []
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if active is not None and not callable(active):
            off = getattr(module, "disable_adapters", False), getattr(module, "merged", False)
            found.append([name, list(active), dict(getattr(module, "scaling", {})), off])
    return found

"""Checkpoints in and out: a Hugging Face directory of config.json and safetensors files, sharded or not.

A load is all or nothing: every tensor is accounted for by name and shape before a model is returned.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from antefix.errors import ConfigError, ModelError
from antefix.layout import KVFormat
from antefix.model.model import Model
from antefix.model.model_config import ModelConfig, read_config
from antefix.model.names import TensorTarget, checkpoint_name, expert_name, target_of
from antefix.model.norms_rope import inverse_frequencies

log = logging.getLogger("antefix.model")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_format: KVFormat = KVFormat.FP8,
) -> Model:
    """Load a `deepseek_v4` directory for inference (no gradients).

    Raises:  ModelError: a file or tensor is missing, misshapen, unexpected or unreadable; the message names it.
        ConfigError: the device is none, or cannot be used here.
    """
    check_device(device)
    directory = Path(path)
    config = ModelConfig.from_dir(directory)
    for note in config.notes:
        log.warning("%s: %s", directory / "config.json", note)
    with torch.device("meta"):
        model = Model(config, kv_format=kv_format)
    files = checkpoint_files(directory)
    tensors = _assemble(model, files)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    placed = {name: _place(tensor, device, dtype) for name, tensor in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    # These two are derived, not stored; they stay float32 whatever the model's dtype.
    model.rope_main = inverse_frequencies(config.rope_main, config.geometry.rope_dim).to(device)
    model.rope_compress = inverse_frequencies(config.rope_compress, config.geometry.rope_dim).to(device)
    return model.requires_grad_(False).eval()


def check_device(device: str | torch.device) -> None:
    """Raises:  ConfigError: not a device, or one that cannot be used here."""
    try:
        # Torch says only when a tensor goes there that it was built without this device, or that no card is there.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used: {reason}; `antefix doctor` says what is there"
        ) from err


def save_model(model: Model, path: str | Path, *, config: dict[str, object] | None = None) -> None:
    """Write a directory that `load_model` and transformers read. `config` becomes config.json.

    Raises:  ModelError: no config given and none in the directory.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    ModelConfig.from_dict(read_config(directory))
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors.update(_split_experts(name, tensor.detach().cpu()))
        else:
            tensors[checkpoint_name(name)] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, directory / _SINGLE, metadata={"format": "pt"})


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name. Raises ModelError when one is missing."""
    index = directory / _INDEX
    if not index.exists():
        if not (directory / _SINGLE).is_file():
            raise ModelError(f"{directory} holds neither {_SINGLE} nor {_INDEX}")
        return [directory / _SINGLE]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({directory / str(name) for name in weight_map.values()})
    except (OSError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as err:
        raise ModelError(f"cannot read {index}: {err}") from err
    for file in files:
        if file.parent != directory or not file.is_file():
            raise ModelError(f"{index} names {file.name}, which is not in {directory}")
    return files


def _assemble(model: Model, files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of the model from the files, experts stacked, each checked by name and shape."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (a safetensors reader is not a dict)
                    _take(name, reader.get_tensor(name), wanted, found, experts)
        except (SafetensorError, OSError) as err:
            raise ModelError(f"cannot read {file}: {err}") from err
    for name, parts in experts.items():
        found[name] = _stack_experts(name, parts, wanted[name])
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ModelError(f"tensor {checkpoint_name(missing[0])} is missing ({len(missing)} in all)")
    return found


def _take(
    name: str,
    tensor: Tensor,
    wanted: dict[str, torch.Size],
    found: dict[str, Tensor],
    experts: dict[str, dict[tuple[int, int], Tensor]],
) -> None:
    target = target_of(name)
    if target is None:
        return
    if target.name == "lm_head.weight" and target.name not in wanted:
        return  # A tied head that was saved all the same.
    if target.name not in wanted:
        raise ModelError(f"unexpected tensor {name}: the config has no place for it")
    if not tensor.is_floating_point() and not name.endswith("tid2eid"):
        raise ModelError(f"tensor {name} has type {tensor.dtype}; only floating point weights can be loaded")
    if target.expert is not None:
        _check_shape(name, tensor, _part_shape(target, wanted[target.name]))
        experts.setdefault(target.name, {})[target.expert, target.part] = tensor
        return
    _check_shape(name, tensor, wanted[target.name])
    found[target.name] = tensor


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ModelError(f"tensor {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}")


def _part_shape(target: TensorTarget, stack: torch.Size) -> torch.Size:
    return torch.Size((stack[1], stack[2]) if target.part == 2 else (stack[1] // 2, stack[2]))


def _stack_experts(name: str, parts: dict[tuple[int, int], Tensor], stack: torch.Size) -> Tensor:
    num_parts = (1, 3) if name.endswith("gate_up_proj") else (2,)
    wanted = {(expert, part) for expert in range(stack[0]) for part in num_parts}
    for expert, part in sorted(wanted - parts.keys()):
        raise ModelError(f"tensor {expert_name(name, expert, part)} is missing")
    for expert, part in sorted(parts.keys() - wanted):
        raise ModelError(f"unexpected tensor {expert_name(name, expert, part)}: the config has {stack[0]} experts")
    return torch.stack([torch.cat([parts[expert, part] for part in num_parts]) for expert in range(stack[0])])


def _split_experts(name: str, stack: Tensor) -> dict[str, Tensor]:
    tensors = {}
    for expert, matrix in enumerate(stack):
        pieces = {2: matrix} if name.endswith("down_proj") else dict(zip((1, 3), matrix.chunk(2), strict=True))
        for part, piece in pieces.items():
            tensors[expert_name(name, expert, part)] = piece.contiguous().clone()
    return tensors


def _place(tensor: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    return (
        tensor.to(device=device, dtype=dtype)
        if tensor.is_floating_point()
        else tensor.to(device=device, dtype=torch.long)
    )

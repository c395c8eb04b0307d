"""Loads and saves checkpoints: a Hugging Face directory of config.json and safetensors files, sharded or not.

A load succeeds as a whole or not at all: every tensor is matched by name, type and shape before any weight is read.
After the plan is made, files are read in order, in spans, and each span is copied straight to where its tensors will
stay. In addition to the model, a load takes two spans of host memory.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from antefix.errors import ConfigError, ModelError
from antefix.layout import KVFormat
from antefix.model.checkpoint import SINGLE, read_checkpoint
from antefix.model.expert_offload import ExpertOffload, names_of, offloaded_layers
from antefix.model.load_plan import LoadPlan, dtype_of, plan_load
from antefix.model.model import Model
from antefix.model.model_config import ModelConfig, read_config
from antefix.model.names import checkpoint_name, expert_name
from antefix.model.norms_rope import inverse_frequencies
from antefix.model.ranks import Ranks, cut_copies, split_model
from antefix.model.read_spans import fill

log = logging.getLogger("antefix.model")

_LOG_EVERY_S = 10.0
# The limit of the GPU's kernels (`antefix_kernels.packed_linear.Weight`). Scales of trained models are far below it.
_FP4_SCALE_MAX = 2.0

# Called with the bytes read so far and the total.
Progress = Callable[[int, int], None]


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_format: KVFormat = KVFormat.FP8,
    rounds_inputs: bool = True,
    drafts: bool = False,
    ranks: Ranks | None = None,
    cpu_offload_bytes: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Load a `deepseek_v4` directory for inference (no gradients). Packed weights stay packed.

    rounds_inputs: round inputs of packed products to FP8, as the released code does.
    drafts: also load the layer that predicts one token further ahead.
    ranks: for a model over several processes: read and hold this rank's share (`antefix.model.ranks`).
    cpu_offload_bytes: this many bytes of the rank's experts, in whole layers, stay in host memory (`expert_offload`).
    progress: called after every span. By default a line is logged every ten seconds.
    Raises:  ModelError: a file or tensor is missing, misshapen, unexpected or unreadable; the message names it.
        ConfigError: `device` is not a device, or cannot be used here.
    """
    check_device(device)
    directory = Path(path)
    model, plan = plan_model(directory, kv_format=kv_format, rounds_inputs=rounds_inputs, drafts=drafts)
    copies = plan.copies
    if ranks is not None:
        sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
        copies = cut_copies(copies, split_model(model, ranks), sizes)
    for note in model.config.notes:
        log.warning("%s: %s", directory / "config.json", note)
    offloaded = offloaded_layers(model, cpu_offload_bytes, dtype) if cpu_offload_bytes else ()
    on_host, pins = names_of(model, offloaded), torch.device(device).type == "cuda"
    state = {
        name: torch.empty(tensor.shape, dtype=dtype_of(name, tensor, dtype), device="cpu", pin_memory=pins)
        if name in on_host
        else torch.empty(tensor.shape, dtype=dtype_of(name, tensor, dtype), device=device)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    fill(state, copies, progress or _LogProgress(directory))
    _check_scales(state, {name for name, form in plan.forms.items() if form.is_fp4})
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    # The RoPE frequencies are derived, not stored. They stay float32 whatever the model's dtype is.
    model.rope_main = inverse_frequencies(model.config.rope_main, model.config.geometry.rope_dim).to(device)
    model.rope_compress = inverse_frequencies(model.config.rope_compress, model.config.geometry.rope_dim).to(device)
    model.requires_grad_(False).eval()
    if offloaded:
        ExpertOffload(model, offloaded, torch.device(device))
    return model


def plan_model(
    directory: Path, *, kv_format: KVFormat = KVFormat.FP8, rounds_inputs: bool = True, drafts: bool = False
) -> tuple[Model, LoadPlan]:
    """The model in a directory, without memory but with its packed modules in place, and the plan for loading its
    weights.

    Raises:  ModelError: as `load_model`.
    """
    config = ModelConfig.from_dir(directory)
    if drafts and config.draft != "mtp":
        have = "DSpark's draft modules, which are not run here" if config.draft else "no layer that drafts"
        raise ModelError(f"the model in {directory} cannot draft tokens: its config has {have}")
    with torch.device("meta"):
        model = Model(config, kv_format=kv_format, drafts=drafts)
    return model, plan_load(model, read_checkpoint(directory), rounds_inputs=rounds_inputs)


def check_device(device: str | torch.device) -> None:
    """Raises:  ConfigError: `device` is not a device, or cannot be used here."""
    try:
        # Torch says that it was built without this device, or that there is no GPU, only when a tensor is put there.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used: {reason}; `antefix doctor` says what is there"
        ) from err


def save_model(model: Model, path: str | Path, *, config: dict[str, object] | None = None) -> None:
    """Write a directory that `load_model` and transformers read. `config` becomes config.json.

    Raises:  ModelError: no config given and none in the directory, or the model's weights are packed.
    """
    if any(name.endswith(".codes") for name in model.state_dict()):
        raise ModelError(
            "packed weights are not written again; use the files in the directory that they were loaded from"
        )
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
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def _check_scales(state: dict[str, Tensor], fp4_owners: set[str]) -> None:
    """Check that every scale is a number: one NaN scale would turn a layer's block, and then every answer, into NaN."""
    for name, tensor in state.items():
        owner, _, own = name.rpartition(".")
        if own != "scales":
            continue
        values = tensor.float()
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"scales of {checkpoint_name(owner + '.weight')} hold NaN or infinity")
        if tensor.is_cuda and owner in fp4_owners and float(values.max()) > _FP4_SCALE_MAX:
            raise ModelError(f"scales of {owner} exceed {_FP4_SCALE_MAX:g}: the kernels' FP4 values would overflow")


class _LogProgress:
    """Logs the progress of a load every ten seconds; a load that takes less time logs nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started = self._said = time.monotonic()

    def __call__(self, num_read: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self._said < _LOG_EVERY_S:
            return
        self._said = now
        gib, rate = 1 << 30, num_read / (now - self._started)
        log.info(
            "loading the weights of %s: %.1f of %.1f GiB are loaded, at %.2f GiB/s",
            self._directory,
            num_read / gib,
            num_bytes / gib,
            rate / gib,
        )


def _split_experts(name: str, stack: Tensor) -> dict[str, Tensor]:
    tensors = {}
    for expert, matrix in enumerate(stack):
        pieces = {2: matrix} if name.endswith("down_proj") else dict(zip((1, 3), matrix.chunk(2), strict=True))
        for part, piece in pieces.items():
            tensors[expert_name(name, expert, part)] = piece.contiguous().clone()
    return tensors

"""Decides which tensor of a checkpoint goes where in a model, by names, types and shapes; it reads no tensor.

A plan is made from the files' headers and a model without memory. The plan decides which modules stay packed (those
whose weights are stored as FP8 or FP4), and divides the load into copies, each from a file's bytes to a range of one
tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from antefix.errors import ModelError
from antefix.model.checkpoint import FLOAT8S, FLOATS, StoredTensor
from antefix.model.model import Model
from antefix.model.model_config import ModelConfig
from antefix.model.names import checkpoint_name, expert_name, is_known_draft, target_of
from antefix.model.numerics import wide
from antefix.model.packed import PackedForm, PackedLinear, PackedStack

# How many addends share a scale in FP4.
_FP4_GROUP = 32
_SCALE_DTYPES = {"F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu, "F32": torch.float32}
# The released code keeps these in float32, whatever type it multiplies in.
_FLOAT32_ENDINGS = ("sinks", "position_bias", "e_score_correction_bias", "_hc.fn", "_hc.base", "_hc.scale", "hc_fn",
                    "hc_base", "hc_scale")  # fmt: skip
_STACKS = (".experts.gate_up_proj", ".experts.down_proj")
# The released code multiplies this one in BF16, with inputs that are not rounded.
_PLAIN_INPUTS = ("self_attn.o_a_proj",)


# The key for a tensor that is stored in one piece.
_WHOLE: tuple[int | None, int] = (None, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Copies a stored tensor's bytes to `target`'s elements from `first` on. `target` is the name of a tensor of the
    model.
    """

    source: StoredTensor
    target: str
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """copies: in no particular order. skipped: tensors that are known but not used. forms: how each packed module is
    packed.
    """

    copies: tuple[Copy, ...]
    skipped: tuple[StoredTensor, ...]
    forms: Mapping[str, PackedForm]

    @property
    def nbytes(self) -> int:
        """How many bytes are read from files."""
        return sum(copy.source.nbytes for copy in self.copies)


@dataclass(slots=True)
class _Group:
    """The stored tensors for one tensor of the model, by (expert, part), or by _WHOLE."""

    weights: dict[tuple[int | None, int], StoredTensor] = field(default_factory=dict)
    scales: dict[tuple[int | None, int], StoredTensor] = field(default_factory=dict)


def plan_load(model: Model, stored: Mapping[str, StoredTensor], *, rounds_inputs: bool = True) -> LoadPlan:
    """Match every stored tensor with `model`, which has no memory yet, and put packed modules into it.

    rounds_inputs: whether packed products round their inputs. Without it they compute like transformers' dequantised
        load.
    Raises:  ModelError: a tensor is missing, unknown, misshapen or of the wrong type, or packed without its scales.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    groups, skipped = _group(stored, wanted)
    forms: dict[str, PackedForm] = {}
    copies: list[Copy] = []
    for name, shape in wanted.items():
        group = groups.get(name, _Group())
        _check_whole(name, shape, group)
        form = _form_of(name, shape, group, model.config)
        if form is None:
            copies += _plain_copies(name, shape, group)
        else:
            owner = name.removesuffix(".weight")
            is_plain = owner.endswith(_PLAIN_INPUTS) or not rounds_inputs
            forms[owner] = form.plain_inputs() if is_plain else form
            copies += _packed_copies(owner, shape, group, form)
    _check_stacks(forms)
    for owner, form in forms.items():
        pack_module(model, owner, wanted.get(f"{owner}.weight", wanted.get(owner, torch.Size())), form)
    return LoadPlan(copies=tuple(copies), skipped=tuple(skipped), forms=forms)


def dtype_of(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The number type in which the model keeps one of its tensors. dtype: the type of the whole model."""
    if not tensor.is_floating_point() or name.endswith((".codes", ".scales")):
        return tensor.dtype
    return wide(dtype) if name.endswith(_FLOAT32_ENDINGS) else dtype


def _group(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Size]
) -> tuple[dict[str, _Group], list[StoredTensor]]:
    groups: dict[str, _Group] = {}
    skipped: list[StoredTensor] = []
    for name, tensor in stored.items():
        target = target_of(name)
        if target.name not in wanted:
            # A copy of a tied head, or a draft module that is not run.
            if target.name == "lm_head.weight" or (target.is_draft and is_known_draft(name)):
                skipped.append(tensor)
                continue
            raise ModelError(f"unexpected tensor {name}: a model with this config has no such tensor")
        group = groups.setdefault(target.name, _Group())
        held, key = group.scales if target.is_scale else group.weights, (target.expert, target.part)
        if key in held:
            raise ModelError(f"tensors {held[key].name} and {name} are two names of one weight")
        held[key] = tensor
    return groups, skipped


def _parts(name: str, shape: torch.Size, group: _Group) -> list[tuple[int | None, int]]:
    """The pieces in which a tensor is stored, in the order in which they lie in it. A stack of experts may be stored as
    one piece.
    """
    if not name.endswith(_STACKS) or _WHOLE in group.weights:
        return [_WHOLE]
    numbers = (2,) if name.endswith("down_proj") else (1, 3)
    return [(expert, number) for expert in range(shape[0]) for number in numbers]


def _check_whole(name: str, shape: torch.Size, group: _Group) -> None:
    parts = _parts(name, shape, group)
    for key in parts:
        if key not in group.weights:
            raise ModelError(f"tensor {_spelled(name, key)} is missing")
    if len(group.weights) > len(parts):
        unknown = group.weights.keys() - set(parts)
        extra = group.weights[min(unknown, key=str)].name
        raise ModelError(f"unexpected tensor {extra}: the config has only {shape[0]} experts")


def _spelled(name: str, key: tuple[int | None, int]) -> str:
    return checkpoint_name(name) if key[0] is None else expert_name(name, key[0], key[1])


def _part_shape(name: str, shape: torch.Size, group: _Group) -> torch.Size:
    if not name.endswith(_STACKS) or _WHOLE in group.weights:
        return shape
    rows = shape[1] if name.endswith("down_proj") else shape[1] // 2
    return torch.Size((rows, shape[2]))


def _form_of(name: str, shape: torch.Size, group: _Group, config: ModelConfig) -> PackedForm | None:
    """How a tensor is packed; None if it is not packed. All stored pieces of a tensor must be packed in the
    same way.
    """
    part = _part_shape(name, shape, group)
    forms = {key: _form(name, part, tensor, group.scales.get(key), config) for key, tensor in group.weights.items()}
    for key, scale in group.scales.items():
        if forms.get(key) is None:
            raise ModelError(f"unexpected tensor {scale.name}: no packed weight has these scales")
    kinds = Counter(forms.values())
    if len(kinds) > 1:
        usual, other = kinds.most_common()[0][0], kinds.most_common()[-1][0]
        odd = next(group.weights[key].name for key, form in forms.items() if form == other)
        raise ModelError(f"tensor {odd} is {_label(other)}, others of the layer's experts are {_label(usual)}")
    form = next(iter(forms.values()))
    rows = part[0]
    if form is not None and name.endswith("gate_up_proj") and rows % form.block[0]:
        raise ModelError(f"moe_intermediate_size {rows} must be a multiple of the {form.block[0]} rows of FP8 blocks")
    return form


def _check_stacks(forms: Mapping[str, PackedForm]) -> None:
    """Check that a layer's experts are packed alike: their products share one routing, and its tiles depend on that."""
    for owner in [owner.rpartition(".")[0] for owner in forms if owner.endswith(_STACKS)]:
        ups, downs = (forms.get(owner + stack.removeprefix(".experts")) for stack in _STACKS)
        if ups is None or downs is None or ups.is_fp4 != downs.is_fp4:
            raise ModelError(f"experts of {owner}: w1 and w3 are {_label(ups)}, w2 is {_label(downs)}")


def _label(form: PackedForm | None) -> str:
    return "not packed" if form is None else form.label


def _form(
    name: str, shape: torch.Size, tensor: StoredTensor, scale: StoredTensor | None, config: ModelConfig
) -> PackedForm | None:
    """The form of one stored weight, after a check of its type, shape and scale."""
    if tensor.dtype in FLOATS or name.endswith("tid2eid"):
        is_table = name.endswith("tid2eid")
        if is_table and tensor.dtype not in ("I64", "I32"):
            raise ModelError(f"tensor {tensor.name} has type {tensor.dtype}; a table of experts has I64 or I32 numbers")
        _check_shape(tensor, shape)
        return None
    is_fp4 = tensor.dtype in ("I8", "U8", "F4")
    if not is_fp4 and tensor.dtype not in FLOAT8S:
        raise ModelError(f"tensor {tensor.name} has type {tensor.dtype}; only floating point weights can be loaded")
    if config.quantization is None or not _may_be_packed(name) or tensor.dtype == "F8_E5M2":
        reason = "the config has no quantization_config" if config.quantization is None else "it must not be packed"
        raise ModelError(f"tensor {tensor.name} has type {tensor.dtype}, but {reason}")
    if scale is None:
        missing = f"{tensor.name.removesuffix('weight')}scale"
        raise ModelError(f"tensor {tensor.name} has type {tensor.dtype} and no scales: {missing} is missing")
    if is_fp4 and config.quantization.expert_dtype == "fp8":
        raise ModelError(f"tensor {tensor.name} has type {tensor.dtype}, but the config's expert_dtype is fp8")
    if scale.dtype not in _SCALE_DTYPES:
        raise ModelError(f"tensor {scale.name} has type {scale.dtype}; scales are F8_E8M0 or F32")
    block = (1, _FP4_GROUP) if is_fp4 else config.quantization.block
    form = PackedForm(is_fp4=is_fp4, block=block, scale_dtype=_SCALE_DTYPES[scale.dtype])
    # For float4 the stored shape counts numbers, not bytes.
    _check_shape(tensor, shape if tensor.dtype == "F4" else form.code_shape(shape))
    _check_shape(scale, form.scale_shape(shape))
    return form


def _may_be_packed(name: str) -> bool:
    """The matrices that are multiplied with tokens, which excludes tables, norms, biases and the experts' router."""
    is_matrix = name.endswith(("_proj.weight", "lm_head.weight")) and "norm" not in name
    return is_matrix or name.endswith(_STACKS)


def _check_shape(tensor: StoredTensor, shape: torch.Size) -> None:
    if torch.Size(tensor.shape) != shape:
        raise ModelError(f"tensor {tensor.name} has shape {list(tensor.shape)}, the config asks for {list(shape)}")


def _plain_copies(name: str, shape: torch.Size, group: _Group) -> list[Copy]:
    size = math.prod(_part_shape(name, shape, group))
    return [
        Copy(source=group.weights[key], target=name, first=number * size)
        for number, key in enumerate(_parts(name, shape, group))
    ]


def _packed_copies(owner: str, shape: torch.Size, group: _Group, form: PackedForm) -> list[Copy]:
    copies = []
    part = _part_shape(owner, shape, group)
    sizes = math.prod(form.code_shape(part)), math.prod(form.scale_shape(part))
    for number, key in enumerate(_parts(owner, shape, group)):
        copies.append(Copy(source=group.weights[key], target=f"{owner}.codes", first=number * sizes[0]))
        copies.append(Copy(source=group.scales[key], target=f"{owner}.scales", first=number * sizes[1]))
    return copies


def pack_module(model: Model, owner: str, shape: torch.Size, form: PackedForm) -> None:
    """Replace a linear module or a stack of experts by a packed one, without memory."""
    parent_name, _, own_name = owner.rpartition(".")
    parent = model.get_submodule(parent_name)
    with torch.device("meta"):
        packed: nn.Module = PackedStack(form, shape) if owner.endswith(_STACKS) else PackedLinear(form, shape)
    delattr(parent, own_name)
    setattr(parent, own_name, packed)

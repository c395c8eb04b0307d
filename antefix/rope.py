"""Reads RoPE parameters from a config.json: those of window-only layers, and those of compressed branches. Knows no
tensors.

Two forms are accepted. The flat form of RoPE parameters is that of V4's release: `rope_theta`, `compress_rope_theta`,
`qk_rope_head_dim`
and a YaRN in `rope_scaling` that stretches only the compressed branches. The nested form of RoPE parameters is that of
transformers:
`rope_parameters` with `main` and `compress`. A config that DeepSeek's own code and transformers read differently is
refused or noted (docs/MODEL_CONFIGS.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antefix.checked_table import finite
from antefix.errors import InvalidRequest

# Defaults of DeepseekV4Config in transformers 5.23, for configs that leave a field out.
_THETAS = {"main": ("rope_theta", 10000.0), "compress": ("compress_rope_theta", 160000.0)}
# The limit of any count in a config: larger than in any model, and small enough that no later computation overflows.
COUNT_MAX = 2**31 - 1
NUMBER_MAX = 1e30
_ROTARY_FACTOR = 64 / 512
_MAX_POSITIONS = 1048576


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's stretch of a RoPE (arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One RoPE: its base and, if contexts are stretched, its YaRN scaling. `attention_factor` scales cos and sin."""

    theta: float
    yarn: YarnScaling | None = None
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ropes:
    """Both RoPEs of a model.

    dim: how many of a head's last dims RoPE rotates. notes: the points in which transformers would compute differently.
    """

    main: RopeConfig
    compress: RopeConfig
    dim: int
    notes: tuple[str, ...] = ()


def read_ropes(config: Mapping[str, Any], head_dim: int) -> Ropes:
    """The RoPEs of a config.

    Raises:  InvalidRequest: a field is invalid, or asks for a computation in which this code would differ from its
             reference.
    """
    name, given = _given(config)
    nested = [label for label in _THETAS if label in given]
    if not nested:
        theta, default = _THETAS["main"]
        main = RopeConfig(theta=number(config, theta, default))
        compress, notes = _rope(config, "compress", name, given)
        return Ropes(main=main, compress=compress, dim=_flat_dim(config, head_dim), notes=notes)
    if not all(isinstance(given.get(label), Mapping) for label in _THETAS):
        raise InvalidRequest(
            f"{name} must hold main and compress as objects, both or neither; transformers drops one alone"
        )
    main, main_notes = _rope(config, "main", f"{name}.main", given["main"])
    compress, compress_notes = _rope(config, "compress", f"{name}.compress", given["compress"])
    dim, dim_notes = _nested_dim(config, head_dim, name, given)
    return Ropes(main=main, compress=compress, dim=dim, notes=(*main_notes, *compress_notes, *dim_notes))


def number(fields: Mapping[str, Any], name: str, default: float | None, *, where: str = "config field") -> float:
    """A positive number. Raises: InvalidRequest: the value is not a number of the wanted kind, or there is neither
    value nor default.
    """
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= NUMBER_MAX:
        raise InvalidRequest(f"{where} {name} must be a positive number, is {value!r}")
    return float(value)


def _count(fields: Mapping[str, Any], name: str, default: int, *, where: str) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= COUNT_MAX:
        raise InvalidRequest(f"{where} {name} must be a positive integer, is {value!r}")
    return value


def _given(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name of the field that holds the RoPE parameters, and the parameters. If both fields exist, `rope_scaling` is
    read first, as in transformers.
    """
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if given and not isinstance(given, Mapping):
            raise InvalidRequest(f"config field {name} must be a JSON object, is {given!r}")
        if given:
            return name, given
    return "rope_parameters", {}


def _rope(
    config: Mapping[str, Any], label: str, name: str, params: Mapping[str, Any]
) -> tuple[RopeConfig, tuple[str, ...]]:
    """One RoPE from its own parameters (nested form), or the compressed branches' RoPE from flat parameters."""
    theta = _theta(config, label, name, params)
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta), ()
    if kind != "yarn":
        raise InvalidRequest(f"{name}: rope type of {label} must be default or yarn, is {kind!r}: V4 has no other")
    if theta == 1.0:
        raise InvalidRequest(f"{name}: YaRN needs a rope_theta other than 1")
    yarn = _yarn(config, name, params)
    factor, notes = _attention_factor(label, name, params, yarn.factor)
    return RopeConfig(theta=theta, yarn=yarn, attention_factor=factor), notes


def _theta(config: Mapping[str, Any], label: str, name: str, params: Mapping[str, Any]) -> float:
    field, default = _THETAS[label]
    top = number(config, field, default)
    if not name.endswith(f".{label}"):
        return top
    if "rope_theta" not in params and top != number(config, *_THETAS["main"]):
        # transformers would use the window-only layers' base, V4's own code that of the compressed branches.
        raise InvalidRequest(
            f"{name} must give rope_theta: DeepSeek's code and transformers have different defaults for it"
        )
    return number(params, "rope_theta", top, where=f"{name}:")


def _yarn(config: Mapping[str, Any], name: str, params: Mapping[str, Any]) -> YarnScaling:
    where = f"{name}:"
    max_positions = _count(config, "max_position_embeddings", _MAX_POSITIONS, where="config field")
    original = _count(params, "original_max_position_embeddings", max_positions, where=where)
    if "factor" in params and params["factor"] is None:
        factor = number({"factor": max_positions / original}, "factor", None, where=where)
    else:
        factor = number(params, "factor", None, where=where)
    betas = {field: params.get(field) for field in ("beta_fast", "beta_slow")}
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        **{field: number(betas, field, None, where=where) for field, value in betas.items() if value is not None},
    )


def _attention_factor(label: str, name: str, params: Mapping[str, Any], factor: float) -> tuple[float, tuple[str, ...]]:
    """The factor that multiplies cos and sin, and notes.

    V4's own code does not have this factor. For flat configs, transformers has no such factor either, whatever mscale
    says. For nested configs without a factor, transformers uses the YaRN paper's, 0.1 ln(factor) + 1.
    """
    given = params.get("attention_factor")
    if given is not None:
        if not finite(given):
            raise InvalidRequest(f"{name}: attention_factor must be a number, is {given!r}")
        return float(given), ()
    is_flat = not name.endswith(f".{label}")
    if (is_flat and "attention_factor" not in params) or factor <= 1:
        return 1.0, ()
    scales = {field: params[field] for field in ("mscale", "mscale_all_dim") if params.get(field) is not None}
    if len(scales) == 2:
        over, under = (0.1 * number(scales, field, None, where=f"{name}:") * math.log(factor) + 1 for field in scales)
        return over / under, ()
    if scales:
        raise InvalidRequest(
            f"{name}: {next(iter(scales))} alone has no effect (transformers ignores it): give mscale and"
            " mscale_all_dim, or attention_factor"
        )
    paper = 0.1 * math.log(factor) + 1
    if label == "main":
        # V4's own code never stretches window-only layers, so only transformers defines what such a config means.
        return paper, ()
    return 1.0, (
        f"{name} gives no attention_factor: taken as 1.0, as DeepSeek-V4's own code does; transformers would take"
        f" {paper:.4f}",
    )


def _flat_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """The number of RoPE dims of a flat config, which has no nested `partial_rotary_factor`."""
    share, dim = config.get("partial_rotary_factor"), config.get("qk_rope_head_dim")
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
        raise InvalidRequest(f"config field qk_rope_head_dim must be an integer, is {dim!r}")
    if share is None and dim is not None:
        return dim
    by_share = _dim_of("config field partial_rotary_factor", _ROTARY_FACTOR if share is None else share, head_dim)
    if dim not in (None, by_share):
        raise InvalidRequest(
            f"qk_rope_head_dim is {dim}, but partial_rotary_factor {share} of head_dim {head_dim} is {by_share}:"
            " programs differ in which of the two they use, so make them agree"
        )
    return by_share


def _nested_dim(
    config: Mapping[str, Any], head_dim: int, name: str, given: Mapping[str, Any]
) -> tuple[int, tuple[str, ...]]:
    """The number of RoPE dims of a nested config. In transformers each kind of RoPE has its own number of dims; in
    Antefix's records both kinds have the same number.
    """
    top, notes, dims = config.get("partial_rotary_factor"), [], {}
    for label in _THETAS:
        field = f"{name}.{label}.partial_rotary_factor"
        share = given[label].get("partial_rotary_factor", top)
        if share is not None:
            dims[label] = _dim_of(field, share, head_dim)
        elif "partial_rotary_factor" not in given[label] and config.get("qk_rope_head_dim") is not None:
            dims[label] = _flat_dim(config, head_dim)
            notes.append(
                f"{field} is missing: {dims[label]} dims are rotated, as qk_rope_head_dim says and DeepSeek-V4's own"
                " code does; transformers may rotate others"
            )
        else:
            raise InvalidRequest(
                f"{field} must be given: without it, transformers would rotate whole heads, or an eighth of them"
            )
    if dims["main"] != dims["compress"]:
        raise InvalidRequest(
            f"{name}: partial_rotary_factor of main and compress must be equal; they rotate {dims} dims"
        )
    if config.get("qk_rope_head_dim", dims["main"]) != dims["main"]:
        raise InvalidRequest(
            f"{name}: partial_rotary_factor gives {dims['main']} dims, qk_rope_head_dim says otherwise"
        )
    return dims["main"], tuple(notes)


def _dim_of(name: str, share: object, head_dim: int) -> int:
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise InvalidRequest(f"{name} must be a number in (0, 1], is {share!r}")
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise InvalidRequest(
            f"{name} {share} gives {dim} RoPE dims of head_dim {head_dim}; RoPE rotates dims in pairs, so the number"
            " must be even and at least 2"
        )
    return dim

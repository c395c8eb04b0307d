"""Weights that multiply the same inputs, kept side by side in memory, so that a GPU runs their products as one launch.

A product of few rows takes about as long for 64 outputs as for 4,096, because each program adds up all addends. So five
products of one input take five times as long as one product with all their outputs. The bits do not change: an output's
sum has the same order whatever is computed next to it (`antefix_kernels.linear`, `packed_fp8`), and packed weights
are joined only if their sums are split alike.

The modules' weights become views of the joined memory, which needs no more memory than they did.

Shapes:  N = rows, K = addends, O = outputs of one weight.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from antefix.model.numerics import has_kernels, linear
from antefix.model.packed import PackedLinear, PackedMatrix, card_splits, joined_matrix, stacked

# Products that were computed together, by module.
Products = Mapping[nn.Module, Tensor]
NO_PRODUCTS: Products = types.MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Joined:
    """splits: see `packed.card_product`."""

    matrix: Tensor | PackedMatrix
    splits: int | None


def joined_products(x: Tensor, modules: Sequence[nn.Linear | PackedLinear]) -> Products:
    """x [N, K] times the weight of each module: [N, O] each, views of one result. Without the modules whose weights
    cannot be joined to others, and empty where there are no kernels.
    """
    if not has_kernels(x):
        return NO_PRODUCTS
    found: dict[nn.Module, Tensor] = {}
    plain = [module for module in modules if not isinstance(module, PackedLinear)]
    packed = [module for module in modules if isinstance(module, PackedLinear)]
    for alike in (plain, packed):
        product = joined_product(x, alike)
        if product is not None:
            found.update(zip(alike, product.split([module.weight.shape[0] for module in alike], -1), strict=True))
    return found


def joined_product(x: Tensor, modules: Sequence[nn.Linear | PackedLinear]) -> Tensor | None:
    """x [N, K] times the weights of all modules, [N, sum of their O]; None if the weights cannot be joined, and where
    there are no kernels.
    """
    joined = _joined(modules) if len(modules) > 1 and has_kernels(x) else None
    return None if joined is None else linear(x, joined.matrix, splits=joined.splits)


def product_of(x: Tensor, module: nn.Linear | PackedLinear, done: Products) -> Tensor:
    """x [N, K] times the module's weight, from `done` if it is there."""
    return done[module] if module in done else linear(x, module.weight)


def _joined(modules: Sequence[nn.Linear | PackedLinear]) -> _Joined | None:
    """The modules' joined weight, kept with the first module, and made again if a weight was replaced or moved, or is
    computed in another form. None if the weights cannot be joined.
    """
    kept: tuple[object, _Joined | None] | None = getattr(modules[0], "_antefix_joined", None)
    if kept is not None and kept[0] == _made_of(modules):
        return kept[1]
    # Outside of inference mode, so that the weights can be used everywhere.
    with torch.inference_mode(False):
        joined = _join(modules)
    modules[0]._antefix_joined = (_made_of(modules), joined)  # type: ignore[assignment]
    return joined


def _tensors(module: nn.Linear | PackedLinear) -> tuple[Tensor, ...]:
    return (module.codes, module.scales) if isinstance(module, PackedLinear) else (module.weight,)


def _made_of(modules: Sequence[nn.Linear | PackedLinear]) -> object:
    """Where in memory the tensors lie, and their forms. A tensor that replaces another one while that one is kept lies
    elsewhere.
    """
    places = [(part.data_ptr(), *part.shape) for module in modules for part in _tensors(module)]
    return places, [module.form for module in modules if isinstance(module, PackedLinear)]


def _join(modules: Sequence[nn.Linear | PackedLinear]) -> _Joined | None:
    """Put the modules' weights side by side, and make the modules' own weights views of the joined memory."""
    packed = [module for module in modules if isinstance(module, PackedLinear)]
    if not packed:
        return _join_plain([module for module in modules if isinstance(module, nn.Linear)])
    return _join_packed(packed) if len(packed) == len(modules) else None


def _join_packed(modules: Sequence[PackedLinear]) -> _Joined | None:
    splits = {card_splits(module.weight) for module in modules}
    matrix = joined_matrix([module.weight for module in modules]) if len(splits) == 1 else None
    if matrix is None:
        return None
    row = 0
    for module in modules:
        rows, per_scale = len(module.codes), module.form.block[0]
        module.codes = matrix.codes[row : row + rows]
        module.scales = matrix.scales[row // per_scale : (row + rows) // per_scale]
        row += rows
    return _Joined(matrix, splits.pop())


def _join_plain(modules: Sequence[nn.Linear]) -> _Joined | None:
    weights = [module.weight for module in modules]
    is_alike = len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) == 1
    # An optimizer would keep changing the weights that it was given.
    if not is_alike or any(weight.requires_grad for weight in weights):
        return None
    joined = stacked([weight.detach() for weight in weights])
    for each, part in zip(modules, joined.split([len(weight) for weight in weights]), strict=True):
        each.weight = nn.Parameter(part, requires_grad=False)
    return _Joined(joined, None)

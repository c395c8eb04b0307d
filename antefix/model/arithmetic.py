"""Measures what arithmetic a set-up computes with, and gives it a name: set-ups with equal names compute equal bits.

A hit equals a cold run only where the KV was written by the same arithmetic: another processor, library, driver or
setting may round differently. So every process that loads a model probes it: fixed inputs go through each
product and function that the model runs, in the model's own shapes, and the results' bits are hashed into a name, which
is part of every name of KV. Set-ups that compute the same bits share KV; between set-ups with different bits, every
look-up is a miss.

    cpu-float32-1f3a5b7c9d-0a2c4e6f81       device and precision; digest of products; digest of functions and sums
    cpu-float32-1f3a5b7c9d-0a2c4e6f81-t3    the same, where bits were seen to depend on the number of threads, here 3
    cuda-bfloat16-reproducible-...          on a GPU; both digests also cover the GPU, the driver and the libraries
    cuda-bfloat16-reproducible-...-x2       a model over two GPUs: a GPU's share may be summed in other parts

The probe also checks what exact hits need: a row's results must be the same whether the input is computed whole or in
pieces, and with one thread as with all. The probe takes at most TIME_S_MAX seconds, and reports the checks that failed
(`failed`) and those that it could not make (`unproved`). The probe never sees tokens or stores. Inputs are made from
integers, so that they are the same on every machine.

Shapes:  K = addends, O = columns, R = rows of a pair.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from antefix.block import arithmetic_of, on_cards
from antefix.layout import LayerKind
from antefix.model import arithmetic_cache, numerics
from antefix.model.card_steps import card_steps
from antefix.model.mhc import sinkhorn
from antefix.model.model import Model
from antefix.model.ops import HCA_SEGMENT, KEY_TILE
from antefix.model.packed import PackedForm, PackedLinear, PackedMatrix, PackedStack
from antefix.model.probe_steps import ROW_CUTS, ROWS, Step, function_step, numbers
from antefix.model.quant import value_dtype
from antefix.model.setup import Setup, setup_of

# Time limit of the whole probe: checks that have not run by then are reported as unproved.
TIME_S_MAX: Final = 30.0
# Of wider products only this many columns are probed: a 129,280-token vocabulary would take gigabytes.
COLUMNS_MAX: Final = 8192
# Must change whenever a kernel for attention or routing computes other bits.
KERNELS_REVISION: Final = 2
_PAIRS: Final = 19
_PAIR_CUTS: Final = ((0, 1), (7, 1), (5, 2), (3, 16))
_DIGITS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """name: the arithmetic's name. setup: the machine on which it was measured, for people to read. num_proved: how
    many checks held.

    failed: results that were seen to depend on a row's place or on the number of threads. unproved: properties that
    were not checked.
    """

    name: str
    setup: str
    num_proved: int = 0
    failed: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    is_cached: bool = False

    @property
    def ignores_shapes(self) -> bool:
        """Whether no result was seen to depend on how a prompt is split into chunks."""
        return not any(text.endswith(_PLACE) for text in self.failed)

    @property
    def ignores_threads(self) -> bool:
        """Whether no result was seen to depend on the number of threads."""
        return not any(text.endswith(_THREADS) for text in self.failed)


_PLACE: Final = "depends on a row's place"
_THREADS: Final = "depends on the number of threads"


def probe(
    model: Model,
    *,
    reproducible: bool = False,
    kernels: str = "torch",
    cache_dir: str = "",
    time_s_max: float = TIME_S_MAX,
    setup: Setup | None = None,
) -> Arithmetic:
    """Measure what this process computes for this model, with torch's present number of threads.

    reproducible, kernels: settings of the attention and cache code, which are part of a GPU's name. cache_dir:
    directory of saved probes. A saved probe of the same set-up is used only if a sample of the bits still agrees with
    it; a new probe is saved in that directory. setup: pretend to be on this set-up, for tests.
    """
    setup = setup or setup_of(model.device)
    steps = list(steps_of(model))
    prefix = arithmetic_of(str(model.device), str(model.dtype).removeprefix("torch."), reproducible=reproducible)
    is_card = setup.card != ""
    salt = f"{setup.card} kernels {kernels}{_unprobed_kernels(model.device)}" if is_card else ""
    num_cards = model.ranks.size if is_card and model.ranks is not None else 1
    if num_cards > 1:
        salt += f" of {num_cards} ranks"
    if model.dtype is torch.bfloat16:
        # Sinks, mixing weights and biases stay float32. They are not probed, and earlier versions rounded them.
        salt += " float32 parameters"
    with torch.inference_mode():
        key = arithmetic_cache.key(setup, prefix, salt, [f"{step.label} {step.shape} {step.dtype}" for step in steps])
        sample = _digest(_sample(steps), model.device, salt)
        if found := arithmetic_cache.load(cache_dir, key, sample):
            return replace(Arithmetic(**found), is_cached=True)
        started = time.perf_counter()
        products, functions = (
            _digest([step for step in steps if step.is_product is kind], model.device, salt) for kind in (True, False)
        )
        checked = _check(steps, model.device, setup, started + time_s_max, is_card=is_card)
    name = f"{prefix}-{products}-{functions}"
    if not checked.ignores_threads:
        name += f"-t{setup.threads}"
    if num_cards > 1:
        name += on_cards(num_cards)
        shares = f"shares of weights and heads on {num_cards} cards: probed as wholes"
        checked = replace(checked, unproved=(*checked.unproved, shares))
    measured = replace(checked, name=name, setup=setup.text)
    arithmetic_cache.save(cache_dir, key, sample, measured)
    return measured


def _unprobed_kernels(device: torch.device) -> str:
    """A GPU's kernels for attention and routing are not probed. Instead the name says which of them run."""
    if device.type != "cuda" or importlib.util.find_spec("antefix_kernels") is None:
        return ""
    from antefix_kernels import hopper

    return f" {KERNELS_REVISION}{' for Hopper' if hopper.available(torch.empty(0, device=device)) else ''}"


def steps_of(model: Model) -> Iterator[Step]:
    """Every operation of a forward pass whose result depends on more than one number, once per shape.

    On a GPU, attention, index scores and compressors run as kernels over a pool, and are not probed.
    """
    seen: set[tuple[str, torch.dtype, tuple[int, ...]]] = set()
    on_card = model.device.type == "cuda"
    for step in _on_card(model) if on_card else (*_products(model), *_pairs(model), *_functions(model)):
        name = (step.label, step.dtype, step.shape)
        if name not in seen:
            seen.add(name)
            yield step


def _products(model: Model) -> Iterator[Step]:
    config, dtype = model.config, model.dtype
    geometry = config.geometry
    wide = numerics.wide(dtype)
    for addends, columns in sorted(_matrices(model)):
        yield _linear(addends, columns, dtype)
    yield from _packed_products(model)
    mixing = (2 + config.hc_mult) * config.hc_mult
    for columns in (mixing, config.hc_mult):
        yield _linear(config.hc_mult * config.hidden_size, columns, wide)
    cached = value_dtype(model.layout.kv_format)
    dim, window = geometry.head_dim, geometry.window
    for entries in (window, HCA_SEGMENT) if LayerKind.HCA in geometry.layers else (window,):
        yield _linear(dim, entries, cached)
        yield _weighted(entries, dim, cached)
    if LayerKind.CSA in geometry.layers:
        for tiles in (1, 2, 32):
            yield _linear(geometry.indexer_dim, tiles * KEY_TILE, cached)
    streams = config.hc_mult

    def mix(x: Tensor, _: int) -> Tensor:
        return sinkhorn(x.view(-1, streams, streams) / 4, 2, config.hc_eps)

    yield Step(f"sinkhorn of {streams} streams", wide, (ROWS, streams * streams), ROW_CUTS, mix)


def _on_card(model: Model) -> Iterator[Step]:
    for addends, columns in sorted(_matrices(model)):
        yield _linear(addends, columns, model.dtype)
    yield from _packed_products(model)
    yield from card_steps(model)


def _matrices(model: Model) -> set[tuple[int, int]]:
    """(K, O) of every weight matrix by which tokens are multiplied in the model's own precision."""
    found = set()
    for name, module in model.named_modules():
        # The draft layer decides no bits of KV.
        if isinstance(module, nn.Linear) and not name.startswith("mtp."):
            # Each group of the grouped output projection is a product of its own.
            groups = model.config.o_groups if name.endswith("o_a_proj") else 1
            found.add((module.in_features, module.out_features // groups))
    return found | _matrices_of_experts(model)


def _packed_products(model: Model) -> Iterator[Step]:
    """Products of tokens with packed weights, once per form and shape. The products' bits put into the name how weights
    are packed and whether inputs are rounded.
    """
    found: set[tuple[PackedForm, int, int]] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedStack) and not name.startswith("mtp."):
            shape = module.shape[1:] if isinstance(module, PackedStack) else (module.out_features, module.in_features)
            columns, addends = shape
            groups = model.config.o_groups if name.endswith("o_a_proj") else 1
            found.add((module.form, addends, columns // groups))
    for form, addends, columns in sorted(found, key=lambda key: (key[0].label, key[0].rounds_inputs, *key[1:])):
        yield _packed(form, addends, columns, model.dtype)


def _matrices_of_experts(model: Model) -> set[tuple[int, int]]:
    config = model.config
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if any(isinstance(module, PackedStack) for module in model.modules()):
        return {(hidden, config.num_experts)}
    return {(hidden, 2 * inner), (hidden, inner), (inner, hidden), (hidden, config.num_experts)}


def _linear(addends: int, columns: int, dtype: torch.dtype) -> Step:
    """x times a weight matrix, transposed."""
    probed = columns if columns <= COLUMNS_MAX else COLUMNS_MAX + columns % numerics.COLUMN_TILE
    note = "" if probed == columns else f"{columns} columns of {addends} addends: probed as {probed}"

    def run(x: Tensor, salt: int) -> Tensor:
        return numerics.linear(x, numbers((probed, addends), salt, x.dtype, x.device))

    return Step(f"{addends} x {columns}", dtype, (ROWS, addends), ROW_CUTS, run, note=note)


def _packed(form: PackedForm, addends: int, columns: int, dtype: torch.dtype) -> Step:
    """x times a packed weight matrix, transposed."""
    probed = min(columns, COLUMNS_MAX)
    note = "" if probed == columns else f"{columns} columns of {addends} addends, {form.label}: probed as {probed}"
    inputs = "rounded inputs" if form.rounds_inputs else "plain inputs"

    def run(x: Tensor, salt: int) -> Tensor:
        shape = torch.Size((probed, addends))
        drawn = numbers(form.code_shape(shape), salt, torch.float32, x.device)
        codes = (drawn * 128).to(torch.int32).to(torch.uint8) if form.is_fp4 else drawn.to(torch.float8_e4m3fn)
        powers = (numbers(form.scale_shape(shape), salt + 1, torch.float32, x.device) * 4).round().exp2()
        matrix = PackedMatrix(codes, powers.to(form.scale_dtype), form.block, form.rounds_inputs)
        return numerics.linear(x, matrix)

    label = f"{addends} x {columns}, {form.label}, {inputs}"
    return Step(label, dtype, (ROWS, addends), ROW_CUTS, run, note=note)


def _weighted(addends: int, columns: int, dtype: torch.dtype) -> Step:
    """Attention probabilities times values, where the values are not transposed."""

    def run(x: Tensor, salt: int) -> Tensor:
        return numerics.multiply(x, numbers((addends, columns), salt, x.dtype, x.device))

    return Step(f"{addends} x {columns}, not transposed", dtype, (ROWS, addends), ROW_CUTS, run)


def _pairs(model: Model) -> Iterator[Step]:
    config, geometry = model.config, model.config.geometry
    streams, hidden, dtype = config.hc_mult, config.hidden_size, model.dtype
    yield _pair(1, streams, hidden, dtype)
    yield _pair(streams, streams, hidden, dtype)
    yield _pair(1, config.num_experts_per_token, hidden, dtype)
    yield from _together(model)
    if LayerKind.CSA in geometry.layers:
        cached = value_dtype(model.layout.kv_format)
        yield _pair(config.num_heads, geometry.head_dim, config.index_topk, cached, transposed=True)
        yield _pair(config.num_heads, config.index_topk, geometry.head_dim, cached)
        for tiles in (1, 2, 32):
            yield _pair(1, config.index_num_heads, tiles * KEY_TILE, cached)


def _together(model: Model) -> Iterator[Step]:
    """Products that decode steps of many sequences run as a batch of pairs, and one sequence as a single product."""
    config, geometry = model.config, model.config.geometry
    cached, heads, dim = value_dtype(model.layout.kv_format), config.num_heads, geometry.head_dim
    for entries in (geometry.window, HCA_SEGMENT) if LayerKind.HCA in geometry.layers else (geometry.window,):
        yield _pair(heads, dim, entries, cached, transposed=True, alone=True)
        yield _pair(heads, entries, dim, cached, alone=True)
    if LayerKind.CSA in geometry.layers:
        for tiles in (1, 2, 32):
            keys = tiles * KEY_TILE
            yield _pair(config.index_num_heads, geometry.indexer_dim, keys, cached, transposed=True, alone=True)


def _pair(
    rows: int, addends: int, columns: int, dtype: torch.dtype, *, transposed: bool = False, alone: bool = False
) -> Step:
    """Products run as a batch of pairs. alone: run a single pair as a plain product, which must give the same bits."""
    shape = (columns, addends) if transposed else (addends, columns)

    def run(x: Tensor, salt: int) -> Tensor:
        # Each pair's right side is computed from its left side's row, so a piece of the input gets the same pairs.
        left, seeds = x[:, : rows * addends].view(-1, rows, addends), x[:, rows * addends :]
        right = numbers(shape, salt, x.dtype, x.device) * seeds.view(-1, 1, 1)
        right = right.mT if transposed else right
        if alone and len(x) == 1:
            return numerics.multiply(left[0], right[0]).unsqueeze(0)
        return numerics.multiply_each(left, right)

    label = f"pairs of {rows} x {addends} x {columns}{', transposed' if transposed else ''}{' or alone' * alone}"
    return Step(label, dtype, (_PAIRS, rows * addends + 1), _PAIR_CUTS, run)


def _functions(model: Model) -> Iterator[Step]:
    config, geometry = model.config, model.config.geometry
    wide = numerics.wide(model.dtype)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "exp": torch.exp,
        "rsqrt": lambda x: torch.rsqrt(x.square() + 1e-6),
        "cos": lambda x: torch.cos(x * 65536),
        "sin": lambda x: torch.sin(x * 65536),
        "division": lambda x: 1 / (x.square() + 0.1),
        "sigmoid": numerics.sigmoid,
        "silu": numerics.silu,
        "sqrt of softplus": lambda x: torch.sqrt(numerics.softplus(x)),
    }
    for name, function in functions.items():
        yield function_step(name, function, 1021, wide)
    widths = {config.hidden_size, config.q_lora_rank, geometry.head_dim, geometry.indexer_dim}
    for width in sorted(widths | {config.hc_mult * config.hidden_size}):
        yield function_step(f"mean of {width}", lambda x: x.square().mean(-1, keepdim=True), width, wide)
    for width in sorted({2 * geometry.window, config.index_topk, HCA_SEGMENT, config.num_experts_per_token}):
        yield function_step(f"sum of {width}", lambda x: x.sum(-1, keepdim=True), width, wide)
    if config.scoring_func == "softmax":
        yield function_step("softmax", lambda x: torch.softmax(x, -1), config.num_experts, wide)
    groups = {LayerKind.HCA: geometry.hca_ratio, LayerKind.CSA: 2 * geometry.csa_ratio}
    for kind in sorted(set(geometry.layers) & groups.keys()):
        ratio, width = groups[kind], geometry.head_dim
        pool = functools.partial(_pool, ratio, width)
        yield Step(f"pool of {ratio} x {width}", wide, (5, ratio * width), ((0, 1), (1, 3)), pool, is_product=False)


def _pool(ratio: int, width: int, x: Tensor, _: int) -> Tensor:
    return numerics.sum_middle(x.view(-1, ratio, width))


def _sample(steps: list[Step]) -> list[Step]:
    """All functions and products of the probe that are cheap to compute. A saved probe is used only if the bits of
    these cheap results are still the same.
    """
    cheap = [step for step in steps if step.shape[0] * step.shape[1] <= 1 << 18 and not step.note]
    products = [step for step in cheap if step.is_product]
    picked = [*products[:: max(len(products) // 12, 1)], *(step for step in cheap if not step.is_product)]
    return [replace(step, shape=(min(step.shape[0], 17), step.shape[1])) for step in picked]


def _digest(steps: list[Step], device: torch.device, salt: str) -> str:
    state = hashlib.blake2b(salt.encode(), digest_size=_DIGITS // 2, person=b"antefix-arithmet")
    for number, step in enumerate(steps):
        state.update(f"{step.label} {step.dtype}".encode())
        state.update(_bits(step.run(numbers(step.shape, number, step.dtype, device), number)))
    return state.hexdigest()


def _bits(result: Tensor) -> bytes:
    # Adding 0.0 turns negative zero into positive zero: they are one number, and our code never divides by zero.
    return (result + 0.0).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _check(steps: list[Step], device: torch.device, setup: Setup, deadline: float, *, is_card: bool) -> Arithmetic:
    """Compare each step's results computed whole with those in pieces, and with those of one thread."""
    failed, unproved, num_proved = [], [], 0
    threads = torch.get_num_threads()
    for number, step in enumerate(steps):
        if step.note:
            unproved.append(step.note)
        if time.perf_counter() > deadline:
            unproved.append(f"{step.label}: no time")
            continue
        x = numbers(step.shape, number, step.dtype, device)
        whole = step.run(x, number)
        pieces = [(step.run(x[start : start + count], number), start, count) for start, count in step.cuts]
        if not all(torch.equal(piece, whole[start : start + count]) for piece, start, count in pieces):
            failed.append(f"{step.label}: {_PLACE}")
            continue
        if not is_card and threads > 1:
            torch.set_num_threads(1)
            alone = step.run(x, number)
            torch.set_num_threads(threads)
            if not torch.equal(alone, whole):
                failed.append(f"{step.label}: {_THREADS}")
                continue
        num_proved += 1
    if is_card:
        unproved.append("attention, index and compressor kernels: named by their versions, not probed")
    return Arithmetic(name="", setup="", num_proved=num_proved, failed=tuple(failed), unproved=tuple(unproved))

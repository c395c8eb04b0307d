"""Keeps the experts of some layers in pinned host memory and copies them to the GPU one layer ahead of their use.

    host      the stacks of every offloaded layer, as they were loaded
    places    two buffers on the GPU, which offloaded layers use in turn: even ones the first, odd ones the second

While one layer is computed, the other place is filled for the next offloaded layer, on a separate stream. If layers
with experts on the GPU lie between two offloaded layers, their computation hides the copy. A forward pass uses layers
in order, and after the last one the first is fetched for the next pass. If a layer is used that was not fetched ahead,
as after a replay that left out the top layers, it is fetched at that moment. The results have the same bits as with all
experts on the GPU.

The GPU's memory holds two layers' stacks, so offloading fewer than three layers saves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from antefix.errors import ConfigError
from antefix.model.load_plan import dtype_of
from antefix.model.model import Model
from antefix.model.moe import Experts

_NUM_PLACES = 2


def offloaded_layers(model: Model, num_bytes: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The layers whose experts are kept on the host: at least `num_bytes` in total, spread evenly over the model.

    model: a model without memory will do.  dtype: the type that its weights will have.
    Raises:  ConfigError: `num_bytes` is so small that the places take as much, or is more than all experts have.
    """
    stacks = _stacks(_experts(model, 0))
    per_layer = sum(tensor.numel() * dtype_of(name, tensor, dtype).itemsize for name, tensor in stacks.items())
    num_layers = model.config.num_layers
    count = -(-num_bytes // per_layer)
    if count <= _NUM_PLACES:
        raise ConfigError(
            f"cpu_offload_bytes must be more than {_NUM_PLACES * per_layer:,}, because the card needs as many "
            "bytes for the experts that it fetches"
        )
    if count > num_layers:
        raise ConfigError(f"cpu_offload_bytes is {num_bytes:,}, but all experts take only {num_layers * per_layer:,}")
    return tuple(number * num_layers // count for number in range(count))


def names_of(model: Model, layers: tuple[int, ...]) -> set[str]:
    """Names of the tensors that stay in the host's memory."""
    return {f"model.layers.{i}.mlp.experts.{own}" for i in layers for own in _stacks(_experts(model, i))}


@dataclass(slots=True)
class _Place:
    """One layer's expert weights on the GPU. layer: the layer they belong to, valid once the GPU has passed the event
    `ready`. After the event `free`, these weights are not read any more.
    """

    tensors: dict[str, Tensor]
    layer: int = -1
    ready: torch.cuda.Event | None = None
    free: torch.cuda.Event | None = None


class ExpertOffload:
    """Manages the offloaded layers' copies. Belongs to the model's thread.

    num_waits: how often a layer was used that had not been fetched ahead.  num_fetched: layers that were copied.
    """

    def __init__(self, model: Model, layers: tuple[int, ...], device: torch.device) -> None:
        """The expert weights of these layers must be on the host; from now on the model reads copies on the device."""
        self._order = layers
        self._host = {layer: _stacks(_experts(model, layer)) for layer in layers}
        first = self._host[layers[0]]
        self._places = [
            _Place({name: torch.empty_like(tensor, device=device, pin_memory=False) for name, tensor in first.items()})
            for _ in range(_NUM_PLACES)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            # The places' memory may have belonged to another tensor, whose last kernels still run.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.num_waits = self.num_fetched = 0
        for number, layer in enumerate(layers):
            experts, place = _experts(model, layer), self._places[number % _NUM_PLACES]
            _put(experts, place.tensors)
            experts.offload, experts.layer = self, layer
        model.offload = self
        for number in range(_NUM_PLACES):
            self._fetch(number)

    @contextlib.contextmanager
    def use(self, layer: int) -> Iterator[None]:
        """Inside this context, the expert weights of the layer are on the GPU. At the context's end, the memory is
        filled with the next layer's weights.
        """
        number = self._order.index(layer)
        place = self._places[number % _NUM_PLACES]
        if place.layer != layer:
            self.num_waits += 1
            self._fetch(number)
        if self._stream is not None and place.ready is not None:
            torch.cuda.current_stream().wait_event(place.ready)
        yield
        if self._stream is not None:
            place.free = torch.cuda.current_stream().record_event()
        self._fetch(self._next(number))

    def _next(self, number: int) -> int:
        """The next layer in order that uses the same memory on the GPU; after the last layer, the first one that uses
        it.
        """
        following = number + _NUM_PLACES
        return following if following < len(self._order) else number % _NUM_PLACES

    def _fetch(self, number: int) -> None:
        layer = self._order[number]
        place = self._places[number % _NUM_PLACES]
        if place.layer == layer:
            return
        place.layer = layer
        self.num_fetched += 1
        if self._stream is None:
            for name, tensor in self._host[layer].items():
                place.tensors[name].copy_(tensor)
            return
        with torch.cuda.stream(self._stream):
            if place.free is not None:
                self._stream.wait_event(place.free)
            for name, tensor in self._host[layer].items():
                place.tensors[name].copy_(tensor, non_blocking=True)
            place.ready = self._stream.record_event()


def _experts(model: Model, layer: int) -> Experts:
    experts: Experts = model.model.layers[layer].mlp.experts  # type: ignore[union-attr, assignment]
    return experts


def _stacks(experts: Experts) -> dict[str, Tensor]:
    return {**dict(experts.named_parameters()), **dict(experts.named_buffers())}


def _put(experts: Experts, tensors: dict[str, Tensor]) -> None:
    """Let the module read these tensors instead of its own weights."""
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        module = experts.get_submodule(owner) if owner else experts
        is_parameter = own in module._parameters
        setattr(module, own, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

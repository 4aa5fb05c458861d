"""What a model keeps of the steps that it has read, so that the next one costs one step and not all of them.

A `Memory` holds keys and values of one clip's instruction and steps, and a mark behind every step. A run is a piece of
a batch: new steps behind the first `start` places of a memory. Runs of a batch are worked off in their order, layer by
layer; so one forward may hold many runs of one memory: steps that follow one another, a step that is looked at and
overwritten by the next, or steps that begin again further back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mark(NamedTuple):
    """Where a memory stands behind a step: places taken, the next position, pictures shown."""

    places: int
    position: int
    pictures: int


START = Mark(0, 0, 0)


class Memory:
    """Keys and values of one clip, for inference only.

    Args:
        room: steps for which memory is taken at once; more than these still fit.

    Attributes:
        marks: one behind each step that is held.
    """

    def __init__(self, room: int = 1) -> None:
        self.room = room
        self.marks: list[Mark] = []
        self._capacity = 0
        self._layers: list[Tensor] = []  # (2, H', capacity, D) each: keys, values

    @property
    def bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self._layers)

    def crop(self, steps: int) -> Mark:
        """Hold the first `steps` steps only; the mark behind them."""
        if steps > len(self.marks):
            raise ValueError(f"a memory of {len(self.marks)} steps cannot be cropped to {steps}")
        del self.marks[steps:]
        return self.marks[-1] if self.marks else START

    def clear(self) -> None:
        """Hold nothing, and give the memory back."""
        self.marks, self._capacity, self._layers = [], 0, []

    def fork(self) -> Memory:
        """Another memory of the same steps, which goes its own way."""
        copy = Memory(self.room)
        copy.marks, copy._capacity = list(self.marks), self._capacity
        copy._layers = [layer.clone() for layer in self._layers]
        return copy

    def reserve(self, places: int, step: int) -> None:
        """Make room for `places`, and for further steps of `step` places each as long as `room` is not used up."""
        if places <= self._capacity:
            return
        self._capacity = places + step * max(0, self.room - len(self.marks))
        for number, old in enumerate(self._layers):
            new = old.new_empty(*old.shape[:2], self._capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            self._layers[number] = new

    def layer(self, number: int, like: Tensor) -> Tensor:
        """Keys and values of a layer (2, H', capacity, D); `like` are keys (H', M, D) of that layer."""
        if number == len(self._layers):
            self._layers.append(like.new_empty(2, like.shape[0], self._capacity, like.shape[2]))
        return self._layers[number]


@dataclass(frozen=True)
class Run:
    """`size` new places behind the first `start` of a memory."""

    memory: Memory
    start: int
    size: int


class Recall:
    """The runs of a batch, end to end (M places together): attention of their new places to all before them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def to(self, device: torch.device) -> Recall:
        return self  # masks are made where the queries are

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """query (H, M, D), key and value (H', M, D) -> (H, M, D); keys and values are kept in the memories."""
        found = torch.empty_like(query)
        groups = query.shape[0] // key.shape[0]
        begin = 0
        for run in self.runs:
            end, stop = begin + run.size, run.start + run.size
            kept = run.memory.layer(layer, key)
            kept[0, :, run.start : stop] = key[:, begin:end]
            kept[1, :, run.start : stop] = value[:, begin:end]
            options: dict[str, Any] = {"is_causal": True} if run.start == 0 else {}
            if run.start and run.size > 1:
                options["attn_mask"] = self._mask(run.start, run.size, query.device)
            keys, values = kept[0, None, :, :stop], kept[1, None, :, :stop]
            if groups > 1 and query.is_cuda and ("attn_mask" in options or query.dtype == torch.float32):
                # the kernel that knows groups of heads there takes 16 bits and no mask
                keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            found[:, begin:end] = F.scaled_dot_product_attention(
                query[None, :, begin:end],
                keys,
                values,
                scale=scale,
                enable_gqa=keys.shape[1] != query.shape[0],
                **options,
            )[0]
            begin = end
        return found

    def _mask(self, start: int, size: int, device: torch.device) -> Tensor:
        """bool (size, start + size): all of the memory, and of the new places those that are not later."""
        if (start, size) not in self._masks:
            ones = torch.ones(size, start + size, dtype=torch.bool, device=device)
            self._masks[start, size] = ones.tril(start)
        return self._masks[start, size]

"""Memory of one step: what lives between its passes, and the peak."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Footprint:
    """Bytes beyond what was held before the step, weights above all.

    Attributes:
        kept: between the forward and the backward pass.
        peak: at most; gradients of parameters are in it.
    """

    kept: int
    peak: int


class _Storages(TorchDispatchMode):
    """Storages that torch makes while the mode is on, until they are really freed, whoever holds them."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        """Of all that are alive."""
        alive = [storage for reference in self._alive.values() if (storage := reference()) is not None]
        return sum(storage.nbytes() for storage in alive)


def footprint(device: torch.device, forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> Footprint:
    """Measure one step: by the allocator on a GPU, else by counting storages, without what an operation uses inside."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = forward()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        backward(output)
        torch.cuda.synchronize()
        return Footprint(kept, torch.cuda.max_memory_allocated() - before)
    with _Storages() as storages:
        output = forward()
        kept = storages.bytes()
        backward(output)
        del output
    return Footprint(kept, storages.peak)

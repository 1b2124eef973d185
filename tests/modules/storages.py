"""Which tensors are alive: every storage that torch makes while the count runs, until it is really freed."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Counts storages made since it was entered, whoever holds them: autograd in C++, handles, Python."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = weakref.ref(storage)
        return result

    def count(self, elements: int) -> int:
        """How many fp32 storages of so many elements have memory."""
        storages = [storage for reference in self._alive.values() if (storage := reference()) is not None]
        return sum(storage.nbytes() == 4 * elements for storage in storages)

    def elements(self) -> int:
        """Elements of all of them, at four bytes each."""
        storages = [storage for reference in self._alive.values() if (storage := reference()) is not None]
        return sum(storage.nbytes() for storage in storages) // 4

"""What a kernel loads and stores of the stream, counted in the interpreter: distinct elements against the floor of
``ops.costs``, and all that were asked for."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from ops.connections import connection, state_and_output
from triton.runtime.interpreter import InterpreterBuilder

from megatron_vwn.ops import InputNorm
from megatron_vwn.ops.kernels import autograd as kernels
from megatron_vwn.ops.kernels.geometry import MAX_NORMED_SEGMENTS

_SEGMENT = 64


class Traffic:
    """Addresses of elements that kernels loaded or stored."""

    def __init__(self):
        self.accesses = []

    def add(self, pointers, mask):
        addresses = pointers.data.reshape(-1)
        self.accesses.append(addresses if mask is None else addresses[mask.data.reshape(-1)])

    def of(self, *tensors: torch.Tensor) -> tuple[int, int]:
        """Distinct and requested elements of these tensors."""
        addresses = np.concatenate(self.accesses).astype(np.int64)
        ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        inside = np.concatenate([addresses[(addresses >= begin) & (addresses < end)] for begin, end in ranges])
        return len(np.unique(inside)), len(inside)


@contextmanager
def counted():
    """Count the loads and stores of kernels launched inside."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        traffic.add(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        traffic.add(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with patch.multiple(InterpreterBuilder, create_masked_load=counted_load, create_masked_store=counted_store):
        yield traffic


def check_traffic(m: int, n: int) -> None:
    """Every operation touches what it must and asks for at most twice as much.

    The floors, in elements per token with r D = n E: read forward (r+1)D, backward (2r+1)D (the incoming dH of the
    paper's (3r+1)D is no argument of ours: a state has one reader); write (2r+1)D and (3r+2)D; write_read (2r+2)D and
    (3r+3)D. The norm of X adds nothing: it is stored over X, which only asks for X twice more.
    """
    # With n = 32, 5 tiles, of which a program takes several; with the largest, only as many as make several programs.
    tokens = 5 if n <= 32 else 2
    p = connection(m, n, _SEGMENT, dtype=torch.float32)
    h, y = state_and_output(tokens, p, _SEGMENT, dtype=torch.float32)
    wide, narrow = n * _SEGMENT, m * _SEGMENT
    operations = {
        "read": (lambda: (kernels.read(h, p),), wide + narrow, 2 * wide + narrow),
        "write": (lambda: (kernels.write(h, y, p),), 2 * wide + narrow, 3 * wide + 2 * narrow),
        "write_read": (lambda: kernels.write_read(h, y, p, p), 2 * wide + 2 * narrow, 3 * wide + 3 * narrow),
    }
    norm = InputNorm(torch.ones(narrow), 1e-5)
    operations["normed read"] = (lambda: (kernels.read(h, p, norm),), *operations["read"][1:])
    if n <= MAX_NORMED_SEGMENTS:
        operations["normed write_read"] = (lambda: kernels.write_read(h, y, p, p, norm), *operations["write_read"][1:])
    for name, (operation, forward_floor, backward_floor) in operations.items():
        with counted() as traffic:
            outputs = operation()
        floor, backward_floor = tokens * forward_floor, tokens * backward_floor
        inputs = [h] if name in ("read", "normed read") else [h, y]
        # X of a read by itself: stored, loaded and stored again, where 2r + 2 leaves room for H twice and X twice.
        _compare(f"{name} forward", traffic.of(*inputs, *outputs), floor, tokens * narrow * (name == "normed read"))
        gradients = [torch.randn_like(output) for output in outputs]
        with counted() as traffic:
            found = torch.autograd.grad(outputs, inputs, gradients)
        # A write alone needs no H' for its gradients, and no operation its own outputs.
        _compare(f"{name} backward", traffic.of(*inputs, *gradients, *found), backward_floor)


def _compare(name: str, counts: tuple[int, int], floor: int, beyond: int = 0) -> None:
    distinct, requested = counts
    assert distinct == floor, f"{name} touches {distinct} elements, the floor is {floor}"
    most = 2 * floor + beyond
    assert requested <= most, f"{name} asks for {requested} elements, allowed are {most}"

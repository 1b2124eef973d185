"""What a kernel loads and stores of the stream, counted in the interpreter: distinct elements against the floor of
``ops.costs``, and all that were asked for."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from ops.connections import connection, state_and_output
from triton.runtime.interpreter import InterpreterBuilder

from megatron_vwn.ops.kernels import autograd as kernels
from megatron_vwn.ops.kernels.geometry import MAX_SMALL
from megatron_vwn.ops.parameters import Gates

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
    """Every operation touches what it must, asks for at most twice as much, and H' of the backward pass beside.

    The floors, in elements per token with r D = n E: read forward (r+1)D, backward (2r+1)D (the incoming dH of the
    paper's (3r+1)D is no argument of ours: a state has one reader); write (2r+1)D and (3r+2)D; write_read (2r+2)D and
    (3r+3)D. The backward pass of a reader loads H' for the gates and for the gradient of W, and for
    n <= 8 once more, from a cache, where the others rebuild it.
    """
    tokens = 2
    p = connection(m, n, _SEGMENT, dtype=torch.float32)
    h, y = state_and_output(tokens, p, _SEGMENT, dtype=torch.float32)
    # Of another state, so that the gradient of this one is what one operation makes of it.
    _, gates = kernels.read(h.detach(), p)
    gates = Gates(*(tensor.detach() for tensor in gates))
    wide, narrow = tokens * n * _SEGMENT, tokens * m * _SEGMENT
    operations = {
        "read": (lambda: kernels.read(h, p), [h], wide + narrow, 2 * wide + narrow),
        "write": (lambda: (kernels.write(h, y, gates, p),), [h, y], 2 * wide + narrow, 3 * wide + 2 * narrow),
        "write_read": (
            lambda: kernels.write_read(h, y, gates, p, p), [h, y], 2 * wide + 2 * narrow, 3 * wide + 3 * narrow,
        ),
    }  # fmt: skip
    for name, (operation, inputs, floor, backward_floor) in operations.items():
        with counted() as traffic:
            outputs = [output for output in operation() if isinstance(output, torch.Tensor)]
        _compare(f"{name} forward", traffic.of(*inputs, *outputs), floor)
        given = [torch.randn_like(output) for output in outputs]
        with counted() as traffic:
            found = torch.autograd.grad(outputs, inputs, given)
        read_twice = 2 * wide if name == "read" else 0
        _compare(f"{name} backward", traffic.of(*inputs, *given, *found), backward_floor, read_twice)
        if name == "write_read":
            _, requested = traffic.of(outputs[0])
            most = (3 if n <= MAX_SMALL else 2) * wide
            assert requested <= most, f"{name} backward asks for {requested} elements of H', allowed are {most}"


def _compare(name: str, counts: tuple[int, int], floor: int, beyond: int = 0) -> None:
    distinct, requested = counts
    assert distinct == floor, f"{name} touches {distinct} elements, the floor is {floor}"
    most = 2 * floor + beyond
    assert requested <= most, f"{name} asks for {requested} elements, allowed are {most}"

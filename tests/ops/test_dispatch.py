"""Which implementation a connection is planned with. Nothing is computed: Triton needs neither GPU nor interpreter."""

import pytest
import torch
from ops.connections import connection

from megatron_vwn import ops
from megatron_vwn.ops import eager

pytest.importorskip("triton")


def implementation(m=2, n=8, dtype=torch.float32, **changes):
    carry = changes.pop("carry", "full")
    p = connection(m, n, 16, carry=carry, dtype=dtype)._replace(**{"kernels": "triton", **changes})
    return ops.implementation(torch.empty(3, n, 16, dtype=dtype), p)


@pytest.mark.parametrize("n", [8, 32, 64])
def test_kernels_compute_where_they_can(n):
    from megatron_vwn.ops.kernels import autograd

    assert implementation(m=8, n=n) is autograd


@pytest.mark.parametrize(
    "changes",
    [
        {"kernels": "torch"},
        {"kernels": "auto"},  # no GPU here
        {"carry": "doubly-stochastic"},
        {"n": 72},
        {"eps": 0.0},
        {"dtype": torch.float64},
        {"sum_over_ranks": torch.Tensor.clone},
    ],
    ids=str,
)
def test_torch_operations_take_what_kernels_cannot(changes):
    assert implementation(**changes) is eager

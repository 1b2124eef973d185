"""Which implementation a connection is planned with. Nothing is computed: Triton needs neither GPU nor interpreter."""

import pytest
import torch
from ops.connections import connection

from megatron_vwn import ops
from megatron_vwn.ops import Plan, eager

pytest.importorskip("triton")
COMPOSED = Plan(eager)


def plan(m=2, n=8, dtype=torch.float32, **changes):
    carry = changes.pop("carry", "full")
    p = connection(m, n, 16, carry=carry, dtype=dtype)._replace(**{"kernels": "triton", **changes})
    return ops.plan(torch.empty(3, n, 16, dtype=dtype), p)


@pytest.mark.parametrize(("n", "normalizes"), [(8, True), (32, True), (64, False)])
def test_kernels_fuse_and_normalise_where_they_can(n, normalizes):
    from megatron_vwn.ops.kernels import autograd

    assert plan(m=8, n=n) == Plan(autograd, normalizes_input=normalizes, fuses_write_read=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernels": "torch"},
        {"kernels": "auto"},  # no GPU here
        {"carry": "doubly-stochastic"},
        {"n": 72},
        {"eps": 0.0},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_torch_operations_take_what_kernels_cannot(changes):
    assert plan(**changes) == COMPOSED
    assert plan(**changes, recompute=True) == Plan(eager.recomputed)

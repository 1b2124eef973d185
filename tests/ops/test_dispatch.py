"""Which implementation a connection is planned with. Nothing is computed: Triton needs neither GPU nor interpreter."""

import sys
import warnings

import pytest
import torch
from ops.connections import connection

from megatron_vwn import ops
from megatron_vwn.ops import dispatch, eager

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


@pytest.fixture
def triton_of(monkeypatch):
    """Makes the installed Triton one of another version, or none (None)."""
    import triton

    def is_now(version):
        monkeypatch.setitem(sys.modules, "triton", None if version is None else triton)
        if version is not None:
            monkeypatch.setattr(triton, "__version__", version)
        forget()

    def forget():
        dispatch.why_not_triton.cache_clear()
        dispatch._warn_without_triton.cache_clear()

    yield is_now
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton is not installed"),
        ("3.4.0", "Triton 3.4.0 is installed, and they are tested with 3.5 to 3.9"),
        ("3.5.1", None),
        ("3.9.2+git1234", None),
        ("3.10.0", "Triton 3.10.0 is installed"),
        ("4.0", "Triton 4.0 is installed"),
    ],
)
def test_a_triton_that_was_not_tested_computes_nothing_and_is_said_once(triton_of, version, reason):
    triton_of(version)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = [implementation(), implementation()]
    assert all((each is eager) == (reason is not None) for each in chosen)
    assert (dispatch.why_not_kernels(8, doubly_stochastic=False) or "").startswith(reason or "")
    assert (dispatch.why_not_group_norm_kernel(64, layer_norm=False) is None) == (reason is None)
    costs = [str(each.message) for each in said if "memory traffic" in str(each.message)]
    assert len(costs) == (reason is not None) and all(reason in each for each in costs)


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": 16385},
        {"layer_norm": True},
        {"sums_over_ranks": True},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_group_norms_without_a_kernel(settings):
    possible = {"channels": 16384, "layer_norm": False, "dtype": torch.bfloat16}
    assert dispatch.why_not_group_norm_kernel(**possible) is None
    assert dispatch.why_not_group_norm_kernel(**{**possible, **settings})

"""The torch implementation against the reference: output and every gradient by name, all parameters perturbed."""

import pytest
import torch
from ops.connections import KINDS, PAIRS, connection, gradients, leaves, state_and_output

from megatron_vwn.ops import eager, reference

# fp64: rounding alone. fp32: sums over n*E <= 512 terms of rounding 6e-8 each.
# bf16: inputs, outputs, logits and gradients of coefficients carry 2^-9 each, through two connections; sums are fp32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n", PAIRS)
def test_output_and_gradients(m, n, kind, dtype):
    segment, tokens = 8, 7
    p = connection(m, n, segment, **KINDS[kind], dtype=dtype)
    h, y = state_and_output(tokens, p, segment, dtype=dtype)
    q = connection(m, n, segment, **KINDS[kind], dtype=dtype, seed=9)
    following = {f"next {name}": leaf for name, leaf in leaves(q).items()}
    x, gates = eager.read(h, p)
    out, next_x, next_gates = eager.write_read(h, y, gates, p, q)
    actual = {"x": x, "h'": out, "next x": next_x, "h''": eager.write(out, y, next_gates, q)}
    inputs = {"h": h, "y": y, **leaves(p), **following}
    actual_gradients = gradients(actual.values(), inputs)

    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    p, q = (
        c._replace(
            routing_NK=exact[f"{prefix}routing"],
            scale_NK=exact.get(f"{prefix}scale"),
            weight_EK=exact.get(f"{prefix}weight"),
            norm_E=exact.get(f"{prefix}norm"),
        )
        for c, prefix in ((p, ""), (q, "next "))
    )
    between = reference.write(exact["h"], exact["y"], p)
    expected = {
        "x": reference.read(exact["h"], p),
        "h'": between,
        "next x": reference.read(between, q),
        "h''": reference.write(between, exact["y"], q),
    }
    expected_gradients = gradients(expected.values(), exact)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    errors |= {f"d{name}": relative_error(actual_gradients[name], expected_gradients[name]) for name in inputs}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors
    assert actual["h'"].dtype == dtype and actual["x"].dtype == dtype


@pytest.mark.parametrize("carry", ["full", "identity"])
def test_bf16_keeps_what_the_stream_already_holds(carry):
    """A deviation of 1e-3 survives bf16: the stream is added to, not multiplied by a rounded 1 + 1e-3."""
    p = connection(2, 4, 32, carry=carry, dtype=torch.bfloat16, std=0.0)
    p = p._replace(routing_NK=torch.full_like(p.routing_NK, 1e-3))
    h, _ = (t.detach() for t in state_and_output(5, p, 32, dtype=torch.bfloat16))
    change = eager.read(h, p)[0].double() - h[:, :2].flatten(1).double()
    expected = (1e-3 * h.double().sum(1, keepdim=True)).expand(-1, 2, -1).flatten(1)
    # Rounding the sum to bf16 may lose at most half a unit in the last place of x.
    half_ulp = h[:, :2].flatten(1).double().abs() * 2.0**-8
    assert ((change - expected).abs() <= half_ulp + 1e-5).all()


@pytest.mark.parametrize("m,n", PAIRS)
def test_tiling_and_averaging_are_the_reference_matrices(m, n):
    x = torch.randn(3, m * 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(eager.tile(x.view(3, m, 4), n), reference.expand(x, None, m, n))
    zero = torch.zeros(m * 4, n, 4, dtype=torch.float64)
    torch.testing.assert_close(eager.average_copies(h, m).flatten(1), reference.reduce(h, zero, m))


@pytest.mark.parametrize("with_bias", [False, True], ids=["rms", "layer"])
def test_group_norm(with_bias):
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(5, 6, 4), (6, 4), (6, 4)])
    bias = bias if with_bias else None
    actual = eager.group_norm(h, weight, bias, m=2, eps=1e-5, segment_size=4)
    torch.testing.assert_close(actual, reference.group_norm(h, weight, bias, 2, 1e-5), rtol=1e-12, atol=1e-12)


def test_empty_and_non_contiguous_inputs():
    p = connection(2, 6, 4)
    h, y = (t.detach() for t in state_and_output(4, p, 4))
    x, gates = eager.read(h[:0], p)
    assert x.shape == (0, 8) and eager.write(h[:0], y[:0], gates, p).shape == (0, 6, 4)
    strided = h.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    (x, gates), (expected_x, expected_gates) = eager.read(strided, p), eager.read(h, p)
    torch.testing.assert_close(x, expected_x, rtol=0, atol=0)
    expected = eager.write(h, y, expected_gates, p)
    torch.testing.assert_close(eager.write(strided, y, gates, p), expected, rtol=0, atol=0)

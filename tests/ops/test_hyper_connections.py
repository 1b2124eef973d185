"""Against code that is not ours: the hyper-connections package computes the special cases m = 1 and, statically
written, m > 1. Forward and every gradient in fp64, all parameters perturbed."""

import math

import pytest
import torch
from hyper_connections import HyperConnections

from megatron_vwn.ops import ConnectionParameters, eager, reference
from megatron_vwn.ops.parameters import initial_pattern

SEGMENT, TOKENS = 6, 5


def theirs(streams, fractions):
    generator = torch.Generator().manual_seed(0)
    module = HyperConnections(streams, dim=fractions * SEGMENT, layer_index=0, num_fracs=fractions).double()
    for name, parameter in module.named_parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if fractions > 1 and name == "dynamic_beta_fn":
            parameter.data.zero_()  # its dynamic write follows another index than the paper's
    return module


def ours(module, streams, fractions):
    """The same connection in our parameters. Our segment (f, s) is fraction f of stream s."""
    m, n = fractions, fractions * streams
    # Their columns are [f2, t] with t = 0 for the branch's input and t = 1 + s for stream s.
    read = torch.arange(m) * (1 + streams)
    carry = (torch.arange(m)[:, None] * (1 + streams) + 1 + torch.arange(streams)).flatten()
    alpha = torch.cat([read, carry])
    beta = module.static_beta.view(streams, m).T.reshape(n, 1).expand(n, m)
    static = torch.cat([module.static_alpha[:, alpha], beta], dim=1)
    beta_fn = module.dynamic_beta_fn.view(SEGMENT, -1)
    weight = torch.cat([module.dynamic_alpha_fn[:, alpha], beta_fn], dim=1) * math.sqrt(SEGMENT)
    scale = torch.cat([module.dynamic_alpha_scale.expand(n, m + n), module.dynamic_beta_scale.expand(n, m)], dim=1)
    pattern = initial_pattern(m, n, n, dtype=torch.float64, device=torch.device("cpu"))
    named = {"routing": static - pattern, "scale": scale - 1, "weight": weight, "norm": module.norm.gamma + 1}
    return ConnectionParameters(m, n, "tanh", 0.0, *named.values())


def by_reference(state, output, p):
    return reference.read(state, p), reference.write(state, output, p)


def by_torch(state, output, p):
    x, gates = eager.read(state, p)
    return x, eager.write(state, output, gates, p)


@pytest.mark.parametrize("compute", [by_reference, by_torch])
@pytest.mark.parametrize("streams,fractions", [(4, 1), (3, 2), (2, 4), (1, 3)])
def test_equals_the_package(streams, fractions, compute):
    module = theirs(streams, fractions)
    p = ours(module, streams, fractions)
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(TOKENS, p.n, SEGMENT, generator=generator, dtype=torch.float64, requires_grad=True)
    output = torch.randn(TOKENS, p.m * SEGMENT, generator=generator, dtype=torch.float64, requires_grad=True)

    # [T, (f s), E] to their [(b s), (f d)], tokens as batch.
    residuals = state.view(TOKENS, fractions, streams, SEGMENT).permute(0, 2, 1, 3).reshape(TOKENS * streams, -1)
    x, write = module(residuals)
    after = write(output).view(TOKENS, streams, fractions, SEGMENT).permute(0, 2, 1, 3).reshape(state.shape)
    actual = compute(state, output, p)
    torch.testing.assert_close(actual[0], x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual[1], after, rtol=1e-10, atol=1e-10)

    # p is made of their parameters, so both sides have gradients of the same leaves.
    inputs = {"state": state, "output": output, **dict(module.named_parameters())}
    if fractions > 1:
        del inputs["dynamic_beta_fn"], inputs["dynamic_beta_scale"]
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in actual]
    for name, tensor in inputs.items():
        got, expected = (
            torch.autograd.grad(
                sum((w * t).sum() for w, t in zip(weights, pair, strict=True)), tensor, retain_graph=True
            )[0]
            for pair in (actual, (x, after))
        )
        assert expected.norm() > 0, name
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"d{name}: {text}")

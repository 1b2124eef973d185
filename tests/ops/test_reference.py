"""The reference against the paper's formulas spelled out index by index, and its gradients against finite
differences."""

import math

import pytest
import torch
from ops.connections import KINDS, PAIRS, connection, leaves, state_and_output

from megatron_vwn.ops import reference


def by_index(h, y, p):
    """One token, scalar by scalar. Column names follow the paper: A is n x (m+n), B is m x n."""
    (n, segment), m = h.shape, p.m
    identity_carry = p.num_carry == 0

    def logit(j, column):
        if not p.dynamic:
            return None
        rms = math.sqrt(sum(float(h[j, e]) ** 2 for e in range(segment)) / segment + p.eps)
        normed = [float(h[j, e]) / rms * float(p.norm_E[e]) for e in range(segment)]
        return sum(v * float(p.weight_EK[e, column]) for e, v in enumerate(normed)) / math.sqrt(segment)

    def coefficient(j, column, initial):
        """Entry of row j: its logit comes from segment j, in A (the segment read) and in B^T (the segment written)."""
        static = initial + p.routing_NK[j, column].item()
        z = logit(j, column)
        if z is None:
            return static
        s = 1 + float(p.scale_NK[j, column])
        return s * math.tanh(z) + static if p.gate == "tanh" else static * 2 / (1 + math.exp(-s * z))

    a_read = [[coefficient(j, i, float(i == j)) for i in range(m)] for j in range(n)]
    if identity_carry:
        a_carry = [[float(i == j) for i in range(n)] for j in range(n)]
    else:
        a_carry = [[coefficient(j, m + i, float(i == j)) for i in range(n)] for j in range(n)]
    if p.doubly_stochastic:
        a_carry = [[math.exp(8 * (i == j) + a_carry[j][i] - (i == j)) for i in range(n)] for j in range(n)]
        for _ in range(20):
            a_carry = [[a / sum(row) for a in row] for row in a_carry]
            sums = [sum(row[i] for row in a_carry) for i in range(n)]
            a_carry = [[a / sums[i] for i, a in enumerate(row)] for row in a_carry]
    first = m + p.num_carry
    b = [[coefficient(j, first + i, float(i == j % m)) for j in range(n)] for i in range(m)]

    y = y.view(m, segment)
    x = torch.zeros(m, segment, dtype=h.dtype)
    out = torch.zeros(n, segment, dtype=h.dtype)
    for e in range(segment):
        for i in range(m):
            x[i, e] = sum(a_read[j][i] * h[j, e] for j in range(n))
        for i in range(n):
            out[i, e] = sum(b[k][i] * y[k, e] for k in range(m)) + sum(a_carry[j][i] * h[j, e] for j in range(n))
    return x.flatten(), out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n", [(1, 1), (1, 4), (2, 3), (3, 7), (4, 4)])
def test_equals_the_formulas_index_by_index(m, n, kind):
    p = connection(m, n, 4, **KINDS[kind], std=0.5)
    h, y = (t.detach() for t in state_and_output(3, p, 4))
    x, out = reference.read(h, p), reference.write(h, y, p)
    for token in range(3):
        expected_x, expected_out = by_index(h[token], y[token], p)
        torch.testing.assert_close(x[token], expected_x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out[token], expected_out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m,n", PAIRS)
def test_at_birth_a_sublayer_reads_the_first_segments_and_every_segment_carries_over(m, n):
    p = connection(m, n, 5, std=0.0)
    h, y = state_and_output(2, p, 5)
    assert torch.equal(reference.read(h, p), h[:, :m].flatten(1))
    copies = torch.stack([y.view(2, m, 5)[:, j % m] for j in range(n)], dim=1)
    torch.testing.assert_close(reference.write(h, y, p), h + copies, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n", [(1, 3), (2, 3), (2, 2)])
def test_gradcheck(m, n, kind):
    p = connection(m, n, 3, **KINDS[kind])
    h, y = state_and_output(2, p, 3)
    names = list(leaves(p))

    def run(h, y, *tensors):
        given = dict(zip(names, tensors, strict=True))
        q = p._replace(
            routing_NK=given["routing"],
            scale_NK=given.get("scale"),
            weight_EK=given.get("weight"),
            norm_E=given.get("norm"),
        )
        return reference.read(h, q), reference.write(h, y, q)

    assert torch.autograd.gradcheck(run, (h, y, *leaves(p).values()))


@pytest.mark.parametrize("m,n", PAIRS)
def test_reducing_the_expansion_gives_the_vector_back(m, n):
    x = torch.randn(4, m * 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = reference.expand(x, None, m, n)
    back = reference.reduce(h, torch.zeros(m * 3, n, 3, dtype=torch.float64), m)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)
    for j in range(n):
        torch.testing.assert_close(h[:, j], x.view(4, m, 3)[:, j % m], rtol=0, atol=0)


def test_gradcheck_of_reduction_and_group_norm():
    generator = torch.Generator().manual_seed(0)
    h, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 4, 3), (6, 4, 3)]
    )
    gain, bias = (torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(h, weight, gain, bias):
        return (
            reference.reduce(reference.group_norm(h, gain, bias, 2, 1e-5), weight, 2),
            reference.reduce(reference.group_norm(h, gain, None, 2, 1e-5), weight, 2),
        )

    assert torch.autograd.gradcheck(run, (h, weight, gain, bias))


def test_doubly_stochastic_carry_sums_to_one_and_no_depth_amplifies():
    generator = torch.Generator().manual_seed(0)
    n, depth = 64, 60
    product = torch.eye(n, dtype=torch.float64)
    for _ in range(depth):
        logits = 8 * torch.eye(n, dtype=torch.float64) + torch.randn(n, n, generator=generator, dtype=torch.float64)
        carry = reference.sinkhorn(logits)
        assert (carry.sum(0) - 1).abs().max() < 1e-6 and (carry.sum(1) - 1).abs().max() < 5e-2
        product = product @ carry
    assert product.abs().sum(0).max() <= 1 + 1e-5
    assert product.abs().sum(1).max() <= 1.1
    assert torch.linalg.matrix_norm(product, 2) <= 1.01


def test_full_carry_amplifies_with_depth():
    """What the doubly stochastic carry is for: 60 products of I + 0.1 randn at n = 64 pass any bound."""
    generator = torch.Generator().manual_seed(0)
    product = torch.eye(64, dtype=torch.float64)
    for _ in range(60):
        product = product @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=generator)).double()
    assert product.abs().sum(0).max() > 100

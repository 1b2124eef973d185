"""Connections for tests: every learned tensor perturbed away from initialisation, where wrong transposes are
invisible."""

import torch

from megatron_vwn.ops import ConnectionParameters

PAIRS = [(1, 1), (1, 4), (2, 3), (3, 7), (4, 4), (2, 8), (4, 32), (8, 64)]


def connection(m, n, segment, *, gate="tanh", carry="full", dynamic=True, dtype=torch.float64, std=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = 2 * m + (0 if carry == "identity" else n)

    def leaf(*shape, mean=0.0):
        tensor = mean + std * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return tensor.to(dtype).requires_grad_()

    routing = leaf(n, k)
    scale, weight, norm = (leaf(n, k), leaf(segment, k), leaf(segment, mean=1.0)) if dynamic else (None, None, None)
    return ConnectionParameters(m, n, gate, 1e-6, routing, scale, weight, norm, carry == "doubly-stochastic")


def state_and_output(tokens, p, segment, *, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, p.n, segment, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    y = torch.randn(tokens, p.m * segment, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return h, y


def leaves(p):
    named = {"routing": p.routing_NK, "scale": p.scale_NK, "weight": p.weight_EK, "norm": p.norm_E}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def gradients(outputs, inputs):
    """Gradients of a fixed random weighting of the outputs, by input name."""
    generator, loss = torch.Generator().manual_seed(5), 0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output * weight.to(output.device, output.dtype)).sum()
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True), strict=True))


KINDS = {
    f"{gate if dynamic else 'static'}, {carry} carry": {"gate": gate, "carry": carry, "dynamic": dynamic}
    for gate, dynamic in (("tanh", True), ("sigmoid", True), ("tanh", False))
    for carry in ("full", "identity", "doubly-stochastic")
}

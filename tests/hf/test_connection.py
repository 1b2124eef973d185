"""The connection that is written once more for transformers, against ops/: output and every gradient."""

import pytest
import torch
from ops.connections import KINDS, PAIRS, connection, gradients, leaves, state_and_output

from megatron_vwn.hf import VWNConfig
from megatron_vwn.hf import modeling_vwn as hf
from megatron_vwn.ops import eager, reference

# Against the reference, whose fp32 matrices are full: sums over n*E <= 512 terms, 6e-8 each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
SEGMENT = 8


def config_of(m, n, *, gate="tanh", carry="full", dynamic=True, **switches):
    return VWNConfig(
        hidden_size=m * SEGMENT,
        num_attention_heads=1,
        vwn_m=m,
        vwn_n=n,
        vwn_gate=gate,
        vwn_carry=carry,
        vwn_connection="dynamic" if dynamic else "static",
        norm_eps=1e-6,
        **switches,
    )


def module_of(p, config):
    module = hf.VWNConnection(config).to(p.routing_NK.dtype)
    module.load_state_dict({name: t.detach().reshape(getattr(module, name).shape) for name, t in leaves(p).items()})
    return module


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n", PAIRS)
def test_output_and_gradients(m, n, kind, dtype):
    p = connection(m, n, SEGMENT, **KINDS[kind], dtype=dtype)
    h, y = state_and_output(7, p, SEGMENT, dtype=dtype)
    module = module_of(p, config_of(m, n, **KINDS[kind]))
    x, kept = module(h.flatten(1))
    written = module.write(h.flatten(1), y, kept).view_as(h)
    inputs = {"h": h, "y": y, **dict(module.named_parameters())}
    actual = {"x": x, "h'": written, **gradients([x, written], inputs)}

    exact = {name: t.detach().double().requires_grad_() for name, t in {"h": h, "y": y, **leaves(p)}.items()}
    q = p._replace(
        routing_NK=exact["routing"],
        scale_NK=exact.get("scale"),
        weight_EK=exact.get("weight"),
        norm_E=exact.get("norm"),
    )
    outputs = [reference.read(exact["h"], q), reference.write(exact["h"], exact["y"], q)]
    expected = {"x": outputs[0], "h'": outputs[1], **gradients(outputs, exact)}
    errors = {name: relative_error(actual[name].reshape(t.shape), t) for name, t in expected.items()}
    assert all(e <= TOLERANCE[dtype] for e in errors.values()), errors


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_that_of_training(kind):
    """Rounded where ops.eager rounds, so all but a few values are bitwise the same."""
    p = connection(2, 6, 64, **KINDS[kind], dtype=torch.bfloat16)
    h, y = (t.detach() for t in state_and_output(50, p, 64, dtype=torch.bfloat16))
    config = VWNConfig(**{**config_of(2, 6, **KINDS[kind]).to_dict(), "hidden_size": 128})
    module = module_of(p, config)
    x, kept = module(h.flatten(1))
    written = module.write(h.flatten(1), y, kept)
    assert x.dtype == written.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in kept)
    x_training, gates = eager.read(h, p)
    assert (x != x_training).float().mean() < 1e-2
    assert (written != eager.write(h, y, gates, p).flatten(1)).float().mean() < 1e-2


def test_autocast_leaves_the_stream_alone():
    p = connection(2, 6, SEGMENT, dtype=torch.float32)
    h, y = (t.detach() for t in state_and_output(5, p, SEGMENT, dtype=torch.float32))
    module = module_of(p, config_of(2, 6))
    x, kept = module(h.flatten(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_autocast, kept_autocast = module(h.flatten(1))
        written = module.write(h.flatten(1), y, kept_autocast)
    assert torch.equal(x, x_autocast) and torch.equal(written, module.write(h.flatten(1), y, kept))


def test_a_fresh_connection_is_a_residual_connection():
    module = hf.VWNConnection(config_of(2, 6))
    h, y = torch.randn(3, 6 * SEGMENT), torch.randn(3, 2 * SEGMENT)
    x, kept = module(h)
    assert torch.equal(x, h[:, : 2 * SEGMENT])
    assert torch.equal(module.write(h, y, kept), h + y.repeat(1, 3))


@pytest.mark.parametrize("linear", ["scaled", "plain"])
@pytest.mark.parametrize("m,n", PAIRS)
def test_expansion_and_reduction(m, n, linear):
    generator = torch.Generator().manual_seed(0)
    config = config_of(m, n, vwn_embedding="projected", vwn_reduce_norm=n % m == 0, vwn_linear=linear)
    power = 0.5 if linear == "scaled" else 0
    expansion, reduction = hf.VWNExpansion(config).double(), hf.VWNReduction(config).double()
    for parameter in (*expansion.parameters(), *reduction.parameters()):
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(5, m * SEGMENT, generator=generator, dtype=torch.float64)
    h = reference.expand(x, expansion.weight / x.shape[-1] ** power, m, n)
    torch.testing.assert_close(expansion(x), h.flatten(1), rtol=1e-12, atol=1e-12)
    normed = h
    if config.vwn_reduce_norm:
        normed = reference.group_norm(h, reduction.norm.weight.view(n, SEGMENT), None, m, config.norm_eps)
    reduced = reference.reduce(normed, reduction.weight / (n * SEGMENT) ** power, m)
    torch.testing.assert_close(reduction(h.flatten(1)), reduced, rtol=1e-12, atol=1e-12)


def test_group_norm_of_layer_norm_models():
    generator = torch.Generator().manual_seed(0)
    norm = hf.VWNGroupNorm(config_of(2, 6, normalization="LayerNorm")).double()
    for parameter in norm.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    h = torch.randn(5, 6, SEGMENT, generator=generator, dtype=torch.float64)
    expected = reference.group_norm(h, norm.weight.view(6, SEGMENT), norm.bias.view(6, SEGMENT), 2, 1e-6)
    torch.testing.assert_close(norm(h.flatten(1)), expected.flatten(1), rtol=1e-12, atol=1e-12)

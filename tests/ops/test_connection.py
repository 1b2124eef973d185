"""The public connection of plain torch: output, every gradient by name, and what it refuses."""

import launch
import pytest
import torch
from ops.connections import KINDS, connection, gradients, leaves, state_and_output

from megatron_vwn import Connection
from megatron_vwn.hf import VWNConfig
from megatron_vwn.hf.modeling_vwn import VWNConnection
from megatron_vwn.ops import eager, implementation, reference, tile

SEGMENT, PAIRS = 8, [(1, 4), (2, 3), (4, 4), (4, 16)]
# fp64: rounding alone. fp32: sums over n*E <= 128 terms of rounding 6e-8 each. bf16: 2^-9 each in inputs,
# outputs, logits and gradients of coefficients.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def module_of(p, segment=SEGMENT, *, gate="tanh", carry="full", dynamic=True, **options):
    kind = "dynamic" if dynamic else "static"
    options = {"dtype": p.routing_NK.dtype, "eps": p.eps, **options}
    module = Connection(p.m, p.n, p.m * segment, connection=kind, gate=gate, carry=carry, **options)
    module.load_state_dict({name: t.detach().reshape(getattr(module, name).shape) for name, t in leaves(p).items()})
    return module


def write(module, h, y):
    return module.write(h, y, module.read(h)[1])


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n", PAIRS)
def test_output_and_gradients(m, n, kind, dtype):
    p = connection(m, n, SEGMENT, **KINDS[kind], dtype=dtype)
    h, y = state_and_output(6, p, SEGMENT, dtype=dtype)
    module = module_of(p, **KINDS[kind])
    x, gates = module.read(h.view(2, 3, -1))
    written = module.write(h.view(2, 3, -1), y.view(2, 3, -1), gates)
    assert x.shape == (2, 3, m * SEGMENT) and written.shape == (2, 3, n * SEGMENT)
    assert x.dtype == written.dtype == dtype
    outputs = [x.flatten(0, 1), written.view_as(h)]
    inputs = {"h": h, "y": y, **dict(module.named_parameters())}
    actual = {"x": outputs[0], "h'": outputs[1], **gradients(outputs, inputs)}

    exact = {name: t.detach().double().requires_grad_() for name, t in {"h": h, "y": y, **leaves(p)}.items()}
    q = p._replace(**{f"{n}_{s}": exact.get(n) for n, s in zip(leaves(p), ("NK", "NK", "EK", "E"), strict=False)})
    expected = [reference.read(exact["h"], q), reference.write(exact["h"], exact["y"], q)]
    expected = {"x": expected[0], "h'": expected[1], **gradients(expected, exact)}
    errors = {name: relative_error(actual[name].reshape(t.shape), t) for name, t in expected.items()}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_those_of_the_hugging_face_model(kind):
    p, options = connection(2, 6, SEGMENT, **KINDS[kind]), KINDS[kind]
    theirs = VWNConnection(
        VWNConfig(
            hidden_size=2 * SEGMENT,
            num_attention_heads=1,
            vwn_m=2,
            vwn_n=6,
            vwn_gate=options["gate"],
            vwn_carry=options["carry"],
            vwn_connection="dynamic" if options["dynamic"] else "static",
            norm_eps=1e-6,
        )
    ).double()
    ours = module_of(p, **options)
    theirs.load_state_dict(ours.state_dict())
    h, y = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT))
    (x, deviations), (our_x, _) = theirs(h), ours.read(h)
    torch.testing.assert_close(our_x, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(write(ours, h, y), theirs.write(h, y, deviations), rtol=1e-12, atol=1e-12)
    again = module_of(connection(2, 6, SEGMENT, **options, seed=3), **options)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(write(again, h, y), write(ours, h, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "doubly" not in kind])
@pytest.mark.parametrize("m,n", PAIRS)
def test_a_fresh_connection_is_a_residual_connection(m, n, kind, dtype):
    options = KINDS[kind]
    module = Connection(
        m,
        n,
        m * SEGMENT,
        connection="dynamic" if options["dynamic"] else "static",
        gate=options["gate"],
        carry=options["carry"],
    )
    x = torch.randn(2, 5, m * SEGMENT).to(dtype)
    tiled = tile(x.unflatten(-1, (m, -1)), n).flatten(-2)
    expected = tile((x + torch.sin(x)).unflatten(-1, (m, -1)), n).flatten(-2)
    assert torch.equal(module(tiled, torch.sin), expected)


def test_a_fresh_doubly_stochastic_carry_of_one_segment_is_a_residual_connection():
    module = Connection(1, 4, SEGMENT, carry="doubly-stochastic")
    x = torch.randn(5, SEGMENT)
    torch.testing.assert_close(module(x.repeat(1, 4), torch.sin), (x + torch.sin(x)).repeat(1, 4))


def test_autocast_leaves_the_stream_alone():
    p = connection(2, 6, SEGMENT, dtype=torch.float32)
    h, y = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT, dtype=torch.float32))
    module = module_of(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, gates = module.read(h)
        written = module.write(h, y, gates)
    assert torch.equal(x, module.read(h)[0]) and torch.equal(written, write(module, h, y))


def test_a_bf16_backbone_writes_to_an_fp32_state():
    p = connection(2, 6, SEGMENT, dtype=torch.float32)
    h, y = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT, dtype=torch.float32))
    written = write(module_of(p), h, y.bfloat16())
    assert written.dtype == torch.float32 and torch.equal(written, write(module_of(p), h, y.bfloat16().float()))


def check_kernels(device, kernels):
    """The fused kernels and the torch operations give the same output and gradients."""
    p = connection(2, 6, 32, dtype=torch.float32)
    h, y = (t.detach().flatten(1).to(device) for t in state_and_output(5, p, 32, dtype=torch.float32))
    results = []
    for choice in (kernels, "torch"):
        module = module_of(p, 32, kernels=choice).to(device)
        inputs = {"h": h.clone().requires_grad_(), "y": y.clone().requires_grad_(), **dict(module.named_parameters())}
        x, gates = module.read(inputs["h"])
        written = module.write(inputs["h"], inputs["y"], gates)
        assert (implementation(inputs["h"].view(5, 6, 32), module._as_tensors()) is not eager) == (choice != "torch")
        results.append({"x": x, "h'": written, **gradients([x, written], inputs)})
    fused, composed = results
    errors = {name: relative_error(fused[name], t.double()) for name, t in composed.items()}
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_by_the_kernels_in_the_interpreter():
    """In a process of its own: importing Triton decides what is interpreted."""
    code = "from ops.test_connection import check_kernels; check_kernels('cpu', 'triton')"
    done = launch.real(0, "-c", code, env=launch.INTERPRETED)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    check_kernels("cuda", "auto")


def test_any_leading_dimensions_and_strides():
    p = connection(2, 6, SEGMENT)
    module = module_of(p)
    h, y = (t.detach().flatten(1) for t in state_and_output(6, p, SEGMENT))
    written = write(module, h, y)
    assert torch.equal(write(module, h[0], y[0]), write(module, h[:1], y[:1])[0])
    assert module.read(h[:0])[0].shape == (0, 16) and write(module, h[:0], y[:0]).shape == (0, 48)
    turned = [t.view(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1) for t in (h, y)]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(write(module, *turned).flatten(0, 1), written, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.read(torch.cat([h, h], -1)[:, :48])[0], module.read(h)[0], rtol=1e-12, atol=1e-12)


def test_parameters_are_built_where_and_as_asked():
    module = Connection(2, 6, 16, dtype=torch.bfloat16, device="meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    module.to_empty(device="cpu").reset_parameters()
    for name, value in module.state_dict().items():
        assert torch.equal(value, torch.full_like(value, name == "norm"))
    assert [name for name, _ in Connection(2, 6, 16, connection="static").named_parameters()] == ["routing"]


@pytest.mark.parametrize(
    "arguments,options,sentence",
    [
        ((4, 2, 16), {}, "raise n to 4 or more"),
        ((3, 6, 16), {}, "choose an m that divides it"),
        ((0, 2, 16), {}, "m is 0: give a whole number"),
        ((2, 4.0, 16), {}, "n is 4.0: give a whole number"),
        ((2, 4, 16), {"connection": "hyper"}, "choose one of dynamic, static"),
        ((2, 4, 16), {"gate": "relu"}, "choose one of tanh, sigmoid"),
        ((2, 4, 16), {"carry": "none"}, "choose one of full, identity, doubly-stochastic"),
        ((2, 4, 16), {"kernels": "cuda"}, "choose one of auto, triton, torch"),
        ((2, 4, 16), {"eps": -1.0}, "eps is -1.0"),
        ((2, 128, 16), {"kernels": "triton"}, 'choose kernels="auto"'),
        ((2, 4, 16), {"kernels": "triton", "carry": "doubly-stochastic"}, 'choose kernels="auto"'),
        ((2, 4, 16), {"kernels": "triton", "eps": 0.0}, 'choose kernels="auto"'),
    ],
)
def test_impossible_arguments_are_refused(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Connection(*arguments, **options)


def test_wrong_shapes_are_refused():
    module = Connection(2, 6, 16)
    with pytest.raises(ValueError, match="16 channels, not n \\* hidden_size / m = 48"):
        module.read(torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"make it \[3, 16\]"):
        module(torch.randn(3, 48), lambda x: x[:, :8])


def test_gates_of_no_read_of_this_state_are_refused():
    p = connection(2, 6, SEGMENT)
    module, fixed = module_of(p), Connection(2, 6, 2 * SEGMENT, connection="static")
    h, y = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT))
    _, gates = module.read(h[:1])
    with pytest.raises(ValueError, match="is dynamic: give the write the gates"):
        module.write(h, y, None)
    with pytest.raises(ValueError, match="the state has 5 tokens of 6 segments"):
        module.write(h, y, gates)
    with pytest.raises(ValueError, match="is static: give the write None"):
        fixed.write(h[:1].float(), y[:1].float(), gates)


def test_a_sublayer_may_begin_in_place():
    p = connection(2, 6, SEGMENT)
    h, _ = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT))
    gradients_of = []
    for sublayer in (torch.relu_, torch.relu):
        module, state = module_of(p), h.clone().requires_grad_()
        module(state, sublayer).square().sum().backward()
        gradients_of.append([state.grad, *(q.grad for q in module.parameters())])
    assert all(map(torch.equal, *gradients_of))


def test_the_backward_pass_under_autocast_is_exact():
    p = connection(2, 6, SEGMENT, dtype=torch.float32)
    h, _ = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT, dtype=torch.float32))
    gradients_of = []
    for enabled in (True, False):
        module = module_of(p)
        loss = module(h, torch.sin).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients_of.append([q.grad for q in module.parameters()])
    assert all(map(torch.equal, *gradients_of))


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compiled_gradients_are_the_same(dynamic):
    p = connection(2, 4, SEGMENT, dynamic=dynamic, dtype=torch.float32)
    h, _ = (t.detach().flatten(1) for t in state_and_output(5, p, SEGMENT, dtype=torch.float32))
    module, state = module_of(p, dynamic=dynamic), h.requires_grad_()

    def loss(state):
        return module(state, torch.sin).square().sum()

    leaves_of = [state, *module.parameters()]
    expected = torch.autograd.grad(loss(state), leaves_of)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(state), leaves_of), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

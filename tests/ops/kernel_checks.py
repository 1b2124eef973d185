"""Checks of the fused kernels against the fp64 reference, on the device they are given: the interpreter's, or a GPU."""

from functools import lru_cache

import torch
from ops.connections import connection, gradients, leaves, state_and_output
from ops.kernel_cases import SWITCHES, Case

from megatron_vwn.ops import InputNorm, reference
from megatron_vwn.ops.kernels import autograd as kernels
from megatron_vwn.ops.kernels.group_norm import group_norm

# Sums over tokens of the same terms, which may cancel in one of them: their errors are measured against both.
_TOGETHER = [("drouting", "dscale"), ("dnext routing", "dnext scale")]


# As large as the mean square: without it the norm of a single scaled segment has no gradient to compare.
_NORM_EPS = 1.0

_OUTPUTS = {"read": ["x"], "write": ["h'"], "write_read": ["h'", "x"]}


def check_parity(case: Case, device: str = "cpu", normed: bool = False) -> dict[str, float]:
    """Relative errors of outputs and of each gradient by name, for the three operations, as "operation: name".

    Args:
        case: the stream.
        device: where to compute.
        normed: whether the reads normalise what they read.
    """
    exact_inputs, expected = _exact(case._replace(dtype=None), device, normed)
    inputs = {name: t.detach().to(case.dtype).requires_grad_() for name, t in exact_inputs.items()}
    p, q = (_replaced(p, inputs, prefix) for p, prefix in zip(_connections(case), ("", "next "), strict=True))
    h, y = inputs["h"], inputs["y"]
    norm = InputNorm(inputs["input norm"], _NORM_EPS) if normed else None
    operations = {
        "read": lambda: [kernels.read(h, p, norm)],
        "write_read": lambda: kernels.write_read(h, y, p, q, norm),
    }
    if not normed:
        operations["write"] = lambda: [kernels.write(h, y, p)]
    errors = {}
    for operation, compute in operations.items():
        outputs, wanted = compute(), expected[operation]
        found = dict(zip(_OUTPUTS[operation], outputs, strict=True))
        for name, tensor in found.items():
            assert tensor.dtype == case.dtype, f"{name} has the dtype {tensor.dtype}"
        found |= {f"d{name}": gradient for name, gradient in gradients(outputs, inputs).items()}
        compared = {name: (found[name], tensor) for name, tensor in wanted.items()}
        errors |= {f"{operation}: {name}": error for name, error in _errors(compared).items()}
    return errors


@lru_cache(maxsize=1)
def _exact(case: Case, device: str, normed: bool) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Inputs of a case in fp64, before they are rounded to any dtype, and of each operation what the reference makes of
    them, outputs and gradients: computed once for the cases that differ in their dtype alone, which follow each other.
    One is kept, as they may be large."""
    p, q = (_moved(p, device) for p in _connections(case))
    h, y = (t.detach().to(device).requires_grad_() for t in state_and_output(case.tokens, p, case.segment))
    inputs = {"h": h, "y": y, **leaves(p), **{f"next {name}": leaf for name, leaf in leaves(q).items()}}
    norm = None
    if normed:
        generator = torch.Generator().manual_seed(7)
        weight = 1 + 0.3 * torch.randn(case.m * case.segment, generator=generator, dtype=torch.float64)
        inputs["input norm"] = weight.to(device).requires_grad_()
        norm = InputNorm(inputs["input norm"], _NORM_EPS)
    between = reference.write(h, y, p)
    operations = {
        "read": [reference.read(h, p, norm)],
        "write": [reference.write(h, y, p)],
        "write_read": [between, reference.read(between, q, norm)],
    }
    expected = {}
    for operation, outputs in operations.items():
        named = dict(zip(_OUTPUTS[operation], outputs, strict=True))
        found = {name: g for name, g in gradients(outputs, inputs).items() if g is not None}
        expected[operation] = {
            **{name: output.detach() for name, output in named.items()},
            **{f"d{name}": gradient for name, gradient in found.items()},
        }
    return inputs, expected


def _connections(case: Case) -> tuple:
    """The one that is written, and the next."""
    return tuple(connection(case.m, case.n, case.segment, **SWITCHES[case.switches], seed=seed) for seed in (0, 9))


def check_group_norm(dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Relative errors of the group norm, for groups of sizes that are no power of two and no tokens at all."""
    errors = {}
    for tokens, m, n, segment in ((5, 2, 6, 48), (7, 1, 8, 40), (3, 4, 4, 16), (0, 2, 4, 8)):
        generator = torch.Generator().manual_seed(0)
        h, weight, dout = (
            torch.randn(*shape, generator=generator).to(device, dtype)
            for shape in ((tokens, n, segment), (n, segment), (tokens, n, segment))
        )
        actual, expected = {}, {}
        for results, inputs in ((actual, (h, weight)), (expected, (h.double(), weight.double()))):
            inputs = [tensor.requires_grad_() for tensor in inputs]
            results["out"] = (
                group_norm(*inputs, m=m, eps=1e-5)
                if results is actual
                else reference.group_norm(*inputs, None, m, 1e-5)
            )
            results["dh"], results["dweight"] = torch.autograd.grad(results["out"], inputs, dout.to(inputs[0].dtype))
        found = _errors({name: (actual[name], expected[name]) for name in actual})
        errors |= {f"{tokens} x {n} x {segment}: {name}": error for name, error in found.items()}
    return errors


def check_odd_inputs(device: str = "cpu") -> None:
    """No tokens, inputs and gradients that are not contiguous, and a sublayer of another dtype than the stream."""
    p = _moved(connection(2, 6, 32, dtype=torch.float32), device)
    h, y = (t.detach().to(device) for t in state_and_output(5, p, 32, dtype=torch.float32))
    empty_h, empty_y = h[:0].clone().requires_grad_(), y[:0].clone().requires_grad_()
    out, x = kernels.write_read(empty_h, empty_y, p, p)
    assert out.shape == (0, 6, 32) and x.shape == (0, 64) and kernels.read(empty_h, p).shape == (0, 64)
    weight = torch.ones(64, device=device, requires_grad=True)
    (dweight,) = torch.autograd.grad(kernels.read(empty_h, p, InputNorm(weight, 1e-5)).sum(), [weight])
    assert dweight.shape == (64,) and not dweight.any()
    dh, drouting = torch.autograd.grad(out.sum() + x.sum(), [empty_h, p.routing_NK])
    assert dh.shape == empty_h.shape and not drouting.any()

    strided = h.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    weights = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(3)).to(device).transpose(0, 1)
    results = []
    for state in (strided, h.clone().requires_grad_()):
        out = kernels.write(state, y, p)
        results.append((out, *torch.autograd.grad(out, [state], weights)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    half_y = y.bfloat16().requires_grad_()
    (dy,) = torch.autograd.grad(kernels.write(h, half_y, p).sum(), [half_y])
    assert dy.dtype == torch.bfloat16
    torch.testing.assert_close(kernels.write(h, half_y, p), kernels.write(h, half_y.float(), p), rtol=0, atol=0)


def check_saved() -> None:
    """What is kept for the backward pass, beside parameters: H, Y, and with a norm 4 bytes a token, but no X."""
    tokens, p = 7, connection(2, 3, 32, dtype=torch.float32)
    h, y = state_and_output(tokens, p, 32, dtype=torch.float32)
    norm = InputNorm(torch.ones(64, requires_grad=True), 1e-5)
    operations = {
        lambda: kernels.read(h, p): h.nbytes,
        lambda: kernels.read(h, p, norm): h.nbytes + 4 * tokens,
        lambda: kernels.write_read(h, y, p, p): h.nbytes + y.nbytes,
        lambda: kernels.write_read(h, y, p, p, norm): h.nbytes + y.nbytes + 4 * tokens,
    }
    ours = {t.untyped_storage().data_ptr() for t in (*leaves(p).values(), norm.weight_D)}
    for operation, expected in operations.items():
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = operation()
        assert sum(size for place, size in kept.items() if place not in ours) == expected
        del result


def check_repeats(device: str = "cpu") -> None:
    """Two backward passes of many programs give the same bits."""
    p = _moved(connection(2, 3, 32, dtype=torch.float32), device)
    tokens = 33 if device == "cpu" else 129  # several tiles for each of the interpreter's programs
    h, y = (t.detach().to(device).requires_grad_() for t in state_and_output(tokens, p, 32, dtype=torch.float32))
    inputs = [h, y, *leaves(p).values()]
    first, second = (gradients(kernels.write_read(h, y, p, p), dict(enumerate(inputs))) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def _errors(compared: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    differences = {name: (a.double() - e).norm().item() for name, (a, e) in compared.items()}
    sizes = {name: e.norm().item() for name, (_, e) in compared.items()}
    for group in _TOGETHER:
        largest = max((sizes[name] for name in group if name in sizes), default=0.0)
        sizes |= {name: largest for name in group if name in sizes}
    return {name: difference / max(sizes[name], 1e-30) for name, difference in differences.items()}


def _moved(p, device):
    moved = {name: None if t is None else t.detach().to(device).requires_grad_() for name, t in _tensors(p).items()}
    return p._replace(**moved)


def _tensors(p):
    return {name: getattr(p, name) for name in ("routing_NK", "scale_NK", "weight_EK", "norm_E")}


def _replaced(p, exact, prefix):
    names = {"routing_NK": "routing", "scale_NK": "scale", "weight_EK": "weight", "norm_E": "norm"}
    return p._replace(**{field: exact.get(prefix + name) for field, name in names.items()})

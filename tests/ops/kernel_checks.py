"""Checks of the fused kernels against the fp64 reference, on the device they are given: the interpreter's, or a GPU."""

from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from ops.connections import connection, gradients, leaves, state_and_output
from ops.kernel_cases import SWITCHES, Case
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vwn.ops import reference
from megatron_vwn.ops.kernels import autograd as kernels
from megatron_vwn.ops.kernels import sums, weight
from megatron_vwn.ops.kernels.group_norm import group_norm
from megatron_vwn.ops.parameters import Gates

# Sums over tokens of like terms, which may cancel in one of them, above all where n = 1: their errors are measured
# against the largest.
_TOGETHER = ("drouting", "dscale", "dnext routing", "dnext scale")

_REFERENCE = SimpleNamespace(
    read=lambda h, p: (reference.read(h, p), None),
    write=lambda h, y, gates, p: reference.write(h, y, p),
    write_read=lambda h, y, gates, p, q: (out := reference.write(h, y, p), reference.read(out, q), None),
)


def chain(operations, inputs: dict[str, torch.Tensor], p, q) -> dict[str, torch.Tensor]:
    """A read, a write_read and a write: both kinds of gates, each made by one operation and taken by another, so that
    the gradients of coefficients cross from one to the other."""
    p, q = _replaced(p, inputs, ""), _replaced(q, inputs, "next ")
    x, gates = operations.read(inputs["h"], p)
    out, next_x, gates = operations.write_read(inputs["h"], inputs["y"], gates, p, q)
    return {"x": x, "h'": out, "x'": next_x, "h''": operations.write(out, inputs["next y"], gates, q)}


def check_parity(case: Case, device: str = "cpu") -> dict[str, float]:
    """Relative errors of the outputs and of each gradient of a chain, by name."""
    exact_inputs, expected = _exact(case._replace(dtype=None), device)
    inputs = {name: t.detach().to(case.dtype).requires_grad_() for name, t in exact_inputs.items()}
    found = chain(kernels, inputs, *_connections(case))
    for name, tensor in found.items():
        assert tensor.dtype == case.dtype, f"{name} has the dtype {tensor.dtype}"
    found |= {f"d{name}": gradient for name, gradient in gradients(found.values(), inputs).items()}
    return _errors({name: (found[name], tensor) for name, tensor in expected.items()})


@lru_cache(maxsize=1)
def _exact(case: Case, device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of a case in fp64, before they are rounded to any dtype, and what the reference makes of them, outputs and
    gradients: computed once for the cases that differ in their dtype alone, which follow each other. One is kept, as
    they may be large."""
    inputs = _inputs(case, device)
    outputs = chain(_REFERENCE, inputs, *_connections(case))
    found = {f"d{name}": gradient for name, gradient in gradients(outputs.values(), inputs).items()}
    return inputs, {name: output.detach() for name, output in outputs.items()} | found


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor]:
    p, q = _connections(case)
    h, y = state_and_output(case.tokens, p, case.segment)
    _, next_y = state_and_output(case.tokens, p, case.segment, seed=2)
    named = {"h": h, "y": y, "next y": next_y, **leaves(p), **{f"next {name}": t for name, t in leaves(q).items()}}
    return {name: tensor.detach().to(device).requires_grad_() for name, tensor in named.items()}


def _connections(case: Case) -> tuple:
    """The one that is written, and the next."""
    return tuple(connection(case.m, case.n, case.segment, **SWITCHES[case.switches], seed=seed) for seed in (0, 9))


def check_unused_outputs(m: int, n: int, device: str = "cpu") -> dict[str, float]:
    """Relative errors of the gradients where only some outputs are used: the others' gradients are none, not zeros."""
    case = Case(m, n, torch.float64, 2, 32, "tanh, full")
    p, q = _connections(case)
    exact = _inputs(case, device)
    inputs = {name: t.detach().float().requires_grad_() for name, t in exact.items()}
    errors = {}
    for used in (["x"], ["h'"], ["x'"], ["h''"], ["x'", "h''"]):
        found, expected = (
            gradients([chain(operations, tensors, p, q)[name] for name in used], tensors)
            for operations, tensors in ((kernels, inputs), (_REFERENCE, exact))
        )
        # A part that the reference knows nothing of may be zero.
        compared = {
            name: (torch.zeros_like(exact[name]) if found[name] is None else found[name], gradient)
            for name, gradient in expected.items()
            if gradient is not None
        }
        assert all(g is None or not g.any() for name, g in found.items() if name not in compared), used
        errors |= {f"{' and '.join(used)}: {name}": error for name, error in _errors(compared).items()}
    return errors


def check_few_programs(device: str = "cpu") -> dict[str, float]:
    """Parity where the programs that sum over tokens take several chunks each, as they do with thousands of tokens."""
    with patch.object(sums, "_PROGRAMS", 2), patch.object(weight, "_PROGRAMS", 2):
        return check_parity(Case(3, 12, torch.float32, 33, 32, "sigmoid, full"), device)


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
    p = _moved(connection(2, 3, 32, dtype=torch.float32), device)
    h, y = (t.detach().to(device) for t in state_and_output(4, p, 32, dtype=torch.float32))
    empty_h, empty_y = h[:0].clone().requires_grad_(), y[:0].clone().requires_grad_()
    x, gates = kernels.read(empty_h, p)
    out, next_x, gates = kernels.write_read(empty_h, empty_y, gates, p, p)
    last = kernels.write(out, empty_y, gates, p)
    assert x.shape == next_x.shape == (0, 64) and out.shape == last.shape == (0, 3, 32)
    found = torch.autograd.grad(x.sum() + next_x.sum() + last.sum(), [empty_h, empty_y, *leaves(p).values()])
    assert not any(gradient.any() for gradient in found)

    strided = h.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    weights = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3)).to(device).transpose(0, 1)
    results = []
    for state in (strided, h.clone().requires_grad_()):
        x, gates = kernels.read(state, p)
        out = kernels.write(state, y, gates, p)
        results.append((x, out, *torch.autograd.grad([x, out], [state], [x.detach().t().contiguous().t(), weights])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    half_y = y.bfloat16().requires_grad_()
    _, gates = kernels.read(h, p)
    (dy,) = torch.autograd.grad(kernels.write(h, half_y, gates, p).sum(), [half_y])
    assert dy.dtype == torch.bfloat16
    written = (kernels.write(h, y, gates, p) for y in (half_y, half_y.float()))
    torch.testing.assert_close(*written, rtol=0, atol=0)


def check_saved() -> None:
    """What is kept for the backward pass, beside parameters: what was given and made, and gates, but no X."""
    tokens, p = 7, connection(2, 3, 32, dtype=torch.float32)
    h, y = state_and_output(tokens, p, 32, dtype=torch.float32)
    _, gates = kernels.read(h, p)
    made = sum(t.nbytes for t in gates)
    operations = {
        lambda: kernels.read(h, p): h.nbytes + made,
        lambda: kernels.write(h, y, gates, p): h.nbytes + y.nbytes + gates.logits_TNK.nbytes,
        lambda: kernels.write_read(h, y, gates, p, p): 2 * h.nbytes + y.nbytes + gates.logits_TNK.nbytes + made,
    }
    ours = {t.untyped_storage().data_ptr() for t in leaves(p).values()}
    for operation, expected in operations.items():
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = operation()
        assert sum(size for place, size in kept.items() if place not in ours) == expected
        del result


class _Operations(TorchDispatchMode):
    """Counts, by name, what would be launched on a GPU: torch operations that touch elements, and kernels."""

    _FREE = ("empty", "empty_like", "new_empty", "view", "_unsafe_view", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.launched, self._within = Counter(), False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if not self._within and name not in self._FREE:
            self.launched[name] += 1
        return function(*arguments, **(keywords or {}))

    @contextmanager
    def counted(self):
        """Within, everything is counted; what the interpreter does in a kernel is the kernel's."""
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def one(executor, *arguments, **keywords):
            self.launched[executor.fn.__name__] += 1
            self._within = True
            run(executor, *arguments, **keywords)
            self._within = False

        with patch.object(GridExecutor, "__call__", one), self:
            yield self.launched


def check_small_operations() -> None:
    """Around the kernels that walk over the state a write_read launches at most 4 small ones, its backward pass 8."""
    for m, n in ((1, 4), (4, 16), (8, 64)):
        for switches in ("tanh, full", "static, full"):
            p, q = (connection(m, n, 32, **SWITCHES[switches], dtype=torch.bfloat16) for _ in range(2))
            h, y = state_and_output(1, p, 32, dtype=torch.bfloat16)
            _, gates = kernels.read(h.detach(), p)
            if gates is not None:
                gates = Gates(gates.logits_TNK.detach().requires_grad_(), gates.inverse_rms_TN)
            with _Operations().counted() as launched:
                out, x, made = kernels.write_read(h, y, gates, p, q)
            assert launched.total() <= 1 + 4, launched
            used = [out, x] if made is None else [out, x, made.logits_TNK]
            given = [torch.ones_like(t) for t in used]
            inputs = [h, y, *leaves(q).values(), *([p.routing_NK] if made is None else [gates.logits_TNK])]
            with _Operations().counted() as launched:
                torch.autograd.grad(used, inputs, given)
            assert 2 <= launched.total() <= 2 + 8, launched


def check_repeats(device: str = "cpu") -> None:
    """Two backward passes of many programs give the same bits."""
    case = Case(3, 12, torch.float32, 33 if device == "cpu" else 129, 32, "tanh, full")
    inputs = {name: t.detach().float().requires_grad_() for name, t in _inputs(case, device).items()}
    first, second = (gradients(chain(kernels, inputs, *_connections(case)).values(), inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def _errors(compared: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    differences = {name: (a.double() - e).norm().item() for name, (a, e) in compared.items()}
    sizes = {name: e.norm().item() for name, (_, e) in compared.items()}
    largest = max((sizes[name] for name in _TOGETHER if name in sizes), default=0.0)
    sizes |= {name: largest for name in _TOGETHER if name in sizes}
    return {name: difference / max(sizes[name], 1e-30) for name, difference in differences.items()}


def _moved(p, device):
    return _replaced(p, {name: t.detach().to(device).requires_grad_() for name, t in leaves(p).items()}, "")


def _replaced(p, exact, prefix):
    names = {"routing_NK": "routing", "scale_NK": "scale", "weight_EK": "weight", "norm_E": "norm"}
    return p._replace(**{field: exact.get(prefix + name) for field, name in names.items()})

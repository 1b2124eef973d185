"""``vwn-benchmark kernels``: operations against their floor, each variant only after it agreed with fp64."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron_vwn.benchmark import machine, report
from megatron_vwn.benchmark.machine import Rates
from megatron_vwn.benchmark.operations import (
    Compiled,
    Composed,
    Kernels,
    Problem,
    Variant,
    differentiated,
    grad_outputs,
)
from megatron_vwn.benchmark.peers import STREAMS, Liger, TransformerEngine
from megatron_vwn.benchmark.timing import Timed, interleave
from megatron_vwn.ops import costs
from megatron_vwn.ops.costs import PASSES

# Norm of the difference over norm, per output and per gradient.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# fp64 is computed in parts, so that its memory does not decide what fits.
_TOKENS_AT_ONCE = 1024

HEADER = (
    "op",
    "pass",
    "(m,n)",
    "D",
    "tokens",
    "dtype",
    "variant",
    "ms",
    "10 to 90 %",
    "floor ms",
    "% of floor",
    "remark",
)


def variants() -> dict[str, Variant]:
    """All of them by name, in the order in which they take turns."""
    return {v.name: v for v in (Kernels(), Composed(), Compiled(), TransformerEngine(), Liger())}


def concerns(variant: Variant, problem: Problem) -> bool:
    """Whether the comparison makes sense: mHC's kernels are a connection of m = 1 and n = 4."""
    if not isinstance(variant, TransformerEngine | Liger):
        return True
    return problem.op == "connection" and (problem.width.m, problem.width.n) == (1, STREAMS)


def errors(variant: Variant, problem: Problem, seed: int = 0) -> dict[str, float]:
    """Relative error of each output and each gradient against fp64."""
    generator = torch.Generator(problem.device).manual_seed(seed)
    leaves = variant.leaves(problem, generator)
    _poison(leaves)
    outputs = variant.outputs(problem, leaves)
    weights = grad_outputs(problem, outputs, generator)
    wanted_of = differentiated(leaves)
    gradients = torch.autograd.grad(outputs, list(wanted_of.values()), weights)
    actual = {f"output {i}": o for i, o in enumerate(outputs)}
    for name, gradient in zip(wanted_of, gradients, strict=True):
        actual[f"d{name}"] = variant.defined(problem, name, gradient)

    exact = {name: leaf.detach().double() for name, leaf in leaves.items()}
    squares = {name: torch.zeros(2, dtype=torch.float64, device=problem.device) for name in actual}
    parameters: dict[str, Tensor] = {}

    def compare(name: str, part: Tensor, wanted: Tensor) -> None:
        squares[name] += torch.stack([(part.double() - wanted).square().sum(), wanted.square().sum()])

    for start in range(0, problem.tokens, _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        part = {
            name: (value[rows] if name in variant.per_token else value).clone().requires_grad_(name in wanted_of)
            for name, value in exact.items()
        }
        wanted = variant.expected(problem, part)
        for i, output in enumerate(wanted):
            compare(f"output {i}", outputs[i].detach()[rows], output.detach())
        differentiable = list(differentiated(part).values())
        wanted_gradients = torch.autograd.grad(wanted, differentiable, [w[rows].double() for w in weights])
        for name, gradient in zip(wanted_of, wanted_gradients, strict=True):
            gradient = variant.defined(problem, name, gradient)
            if name in variant.per_token:
                compare(f"d{name}", actual[f"d{name}"][rows], gradient)
            else:
                parameters[name] = parameters.get(name, 0) + gradient
    for name, gradient in parameters.items():
        compare(f"d{name}", actual[f"d{name}"], gradient)
    return {name: (off / norm.clamp_min(1e-60)).sqrt().item() for name, (off, norm) in squares.items()}


def _poison(leaves: dict[str, Tensor]) -> None:
    """Leave NaN in memory that the allocator gives out next, so that what a kernel does not write is seen."""
    if any(leaf.is_cuda for leaf in leaves.values()):
        held = [torch.full_like(leaf, torch.nan) for leaf in leaves.values() for _ in range(2)]
        del held


def disagreement(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """One phrase about everything that is off, or None."""
    off = {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}
    if not off:
        return None
    worst = ", ".join(f"{name} {error:.1e}" for name, error in off.items())
    return f"{worst} (allowed {TOLERANCE[dtype]:.0e})"


def run_problem(
    problem: Problem,
    candidates: Sequence[Variant],
    rates: Rates,
    *,
    warmup: int,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Check and time all variants of one problem; one result per variant and pass."""
    verdicts: dict[str, dict] = {}
    agreed: list[Variant] = []
    for variant in candidates:
        verdict: dict = {}
        if reason := variant.missing(problem):
            verdict = {"status": "missing", "reason": reason}
        else:
            say(f"checking {variant.name}")
            try:
                found = errors(variant, problem)
            except Exception as error:  # anything that somebody's kernel may raise must not end the others' turn
                verdict = {"status": "failed", "reason": _phrase(error)}
            else:
                verdict = {"status": "measured", "parity": found}
                if off := disagreement(found, problem.dtype):
                    verdict |= {"status": "disagrees", "reason": off}
                else:
                    agreed.append(variant)
        verdicts[variant.name] = verdict
    say("timing " + ", ".join(variant.name for variant in agreed))
    times = {direction: _time(problem, agreed, direction, warmup, rounds) if agreed else {} for direction in PASSES}
    results = []
    for direction in PASSES:
        element_bytes = problem.dtype.itemsize
        floor = costs.floor_seconds(
            problem.op,
            direction,
            problem.width,
            problem.tokens,
            bandwidth=rates.bandwidth,
            flop_rate=rates.flop_rate,
            element_bytes=element_bytes,
        )
        for variant in candidates:
            row = {**problem.label, "pass": direction, "variant": variant.name, "remark": variant.remark}
            row |= {"floor_seconds": floor, **verdicts[variant.name]}
            if variant.name in times[direction]:
                seconds = times[direction][variant.name]
                row |= {"seconds": vars(seconds), "share_of_floor": floor / seconds.median}
            results.append(row)
    return results


def _time(problem: Problem, agreed: Sequence[Variant], direction: str, warmup: int, rounds: int) -> dict:
    """Spreads by variant. All variants of this package share their inputs."""
    inputs: dict[tuple, tuple[dict[str, Tensor], list[Tensor]]] = {}
    bytes_of_a_set = costs.elements(problem.op, "forward", problem.width) * problem.tokens * problem.dtype.itemsize
    sets = machine.buffer_sets(problem.device, bytes_of_a_set)

    def buffers(variant: Variant, number: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        key = (type(variant).leaves, variant.package if hasattr(variant, "package") else None, number)
        if key not in inputs:
            generator = torch.Generator(problem.device).manual_seed(1 + number)
            leaves = variant.leaves(problem, generator)
            with torch.no_grad():
                outputs = variant.outputs(problem, leaves)
            inputs[key] = leaves, grad_outputs(problem, outputs, generator)
        return inputs[key]

    def timed(variant: Variant) -> Timed:
        if direction == "forward":
            return Timed(
                lambda leaves: variant.outputs(problem, leaves), prepare=lambda number: buffers(variant, number)[0]
            )

        def prepare(number: int):
            leaves, weights = buffers(variant, number)
            return variant.outputs(problem, leaves), list(differentiated(leaves).values()), weights

        return Timed(lambda prepared: torch.autograd.grad(*prepared), prepare=prepare)

    clock = machine.make_clock(problem.device, cold=True)
    # Every set of buffers is filled before anything counts.
    turns = {variant.name: timed(variant) for variant in agreed}
    return interleave(turns, clock, sets=sets, warmup=max(warmup, sets), rounds=rounds)


def _phrase(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def table_rows(results: Iterable[dict]) -> list[list[str]]:
    """One line of the printed table per result."""
    rows = []
    for result in results:
        seconds = result.get("seconds")
        remark = result["remark"]
        if result["status"] != "measured":
            remark = f"{result['status']}: {result['reason']}"
        rows.append(
            [
                result["op"],
                result["pass"],
                f"({result['m']},{result['n']})",
                str(result["hidden_size"]),
                str(result["tokens"]),
                result["dtype"],
                result["variant"],
                *report.milliseconds(seconds),
                f"{1e3 * result['floor_seconds']:.3f}",
                f"{100 * result['share_of_floor']:.0f}" if seconds else "",
                remark,
            ]
        )
    return rows

"""A plan as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, fields

from megatron_vwn.ops.costs import Width
from megatron_vwn.planner.hardware import Rates, rate_names
from megatron_vwn.planner.kernel_times import taken_lines
from megatron_vwn.planner.memory import Memory
from megatron_vwn.planner.search import Plan
from megatron_vwn.planner.shape import Shape

_GB = 1e9
_ASSUMPTIONS = {
    "memory_gb": "10^9 bytes of a GPU",
    "matrix_tflops": "peak of dense bf16 products, TFLOP/s",
    "memory_gbs": "peak of its memory, GB/s",
    "nvlink_gbs": "one GPU to its node, one direction, GB/s",
    "network_gbs": "one GPU to other nodes, one direction, GB/s",
    "matrix_share": "of the peak in dense products",
    "expert_share": "of the peak in experts' products",
    "attention_share": "of the peak in attention's core",
    "memory_share": "of the memory's peak in kernels that move data, connections apart",
    "link_share": "of the links' peaks in collectives",
    "data_overlap": "of a micro-batch's time that hides data-parallel messages",
    "imbalance": "tokens of the fullest expert-parallel rank over the mean",
    "memory_margin": "of its memory that a layout must leave",
}


def layout(shape: Shape) -> str:
    """One line that names a layout."""
    words = [f"TP{shape.tensor}", f"PP{shape.pipeline}"]
    words += [f"VPP{shape.virtual}"] if shape.virtual > 1 else []
    words += [f"EP{shape.expert}", f"CP{shape.context}", f"DP{shape.data}", f"micro-batch {shape.micro_batch}"]
    if shape.granularity == "full":
        words.append(f"full recompute ({shape.method} {shape.recompute_layers})")
    elif shape.granularity:
        words.append(f"recompute {'+'.join(shape.modules)}")
    if shape.block:
        words.append(f"stream block {shape.block}")
    return " ".join(words)


def plan_lines(plan: Plan, twin: Plan | None, other: tuple[str, Memory] | None, rates: Rates) -> Iterator[str]:
    """Memory, communication and time of one layout.

    Args:
        plan: the layout.
        twin: the same layout without a virtual width; None if the plan has none.
        other: the other choice of stream recompute, and memory of the worst stage with it.
        rates: what was assumed.
    """
    shape, worst = plan.shape, plan.worst
    yield f"Layout: {layout(shape)}; {shape.micro_batches} micro-batches per step"
    yield f"  parameters per rank, by pipeline stage, exact: {', '.join(f'{held.total:,}' for held in plan.held)}"
    memory = plan.memory[worst]
    yield f"  memory of the fullest rank, pipeline stage {worst} of {shape.pipeline}, predicted, in GB:"
    kinds = {field.name: field.name for field in fields(memory)} | {"buffers": "p2p buffers"}
    yield "    " + ", ".join(f"{said} {getattr(memory, name) / _GB:.2f}" for name, said in kinds.items())
    yield f"    total {memory.total / _GB:.2f} of {rates.memory_gb:g}"
    if other is not None:
        name, needed = other
        yield (
            f"    {name}: activations {needed.activations / _GB:.2f}, stream {needed.stream / _GB:.2f}, total "
            f"{needed.total / _GB:.2f}"
        )
    if memory.total > _GB * rates.memory_gb:
        yield f"  WARNING: {(memory.total / _GB - rates.memory_gb):.2f} GB more than the GPU has."
    elif not plan.fits(rates):
        yield f"  WARNING: this leaves less than {rates.memory_margin:.0%} of the GPU's memory."
    yield "  bytes sent per step by the busiest rank, predicted, in GB: " + ", ".join(
        f"{group} {count / _GB:.3f}" for group, count in sorted(plan.step.sent.items())
    )
    if twin is not None:
        more = sum(plan.step.sent.values()) - sum(twin.step.sent.values())
        yield f"    of this because of the virtual width: {more / _GB:.3f}"
    step = plan.step
    yield f"  step, predicted: {step.seconds:.3f} s, {step.tokens_per_second:,.0f} tokens/s, of this"
    for name, seconds in sorted(step.parts.items(), key=lambda item: -item[1]):
        if seconds > 0:
            yield f"    {name:<24}{seconds:>9.3f} s {seconds / step.seconds:>7.1%}"
    if twin is not None:
        yield f"  the same layout without the virtual width, whose own best may be another: {twin.step.seconds:.3f} s"


def search_lines(plans: list[Plan], looked: int, rates: Rates) -> Iterator[str]:
    """The layouts that a search found."""
    if not plans:
        yield (
            f"None of {looked} layouts and micro-batches that divide fits into the {rates.usable / _GB:g} GB that "
            "--memory-margin leaves: take more GPUs."
        )
        return
    yield f"Best of {looked} layouts and micro-batches that divide, with all kinds of recompute, by predicted time:"
    yield f"  {'step s':>8} {'tokens/s':>12} {'GB':>6}  layout"
    yield from map(_found_line, plans)


def twin_lines(own: Plan | None, found: list[Plan], twin: list[Plan], looked: int) -> Iterator[str]:
    """The best layout of the model without a virtual width, and what the virtual width is against that.

    Args:
        own: the recipe's layout, if it can be run.
        found: the recipe's best layouts.
        twin: the twin's; the first is its best.
        looked: how many of its layouts divide.
    """
    if not twin:
        yield f"None of {looked} layouts of its twin without a virtual width fits."
        return
    yield f"Its twin without a virtual width has a best layout of its own, of {looked}:"
    yield _found_line(twin[0])
    for name, seconds in shares(own, found, twin).items():
        yield f"  share of the virtual width in the step against that, {name}, predicted: {seconds:.1%}"


def shares(own: Plan | None, found: list[Plan], twin: list[Plan]) -> dict[str, float]:
    """What of a step the twin would not need in its own best layout, of the recipe's layout and of the best found."""
    of = {"in this recipe's layout": [own] if own else [], "in the best found": found[:1]}
    return {name: 1 - twin[0].step.seconds / plans[0].step.seconds for name, plans in of.items() if plans and twin}


def _found_line(plan: Plan) -> str:
    total = plan.memory[plan.worst].total / _GB
    return f"  {plan.step.seconds:>8.3f} {plan.step.tokens_per_second:>12,.0f} {total:>6.1f}  {layout(plan.shape)}"


def assumption_lines(hardware: str, rates: Rates, width: Width | None) -> Iterator[str]:
    """Every rate that went in, with the flag that changes it, and what was taken of the stream's kernels."""
    yield f"Assumed of {hardware} (data sheet and guesses, not measured; each has a flag):"
    for name in rate_names():
        yield f"  --{name.replace('_', '-'):<18}{getattr(rates, name):>8g}  {_ASSUMPTIONS[name]}"
    if width is not None and rates.connections is not None:
        yield from taken_lines(rates.connections, width)
    yield "  Layers are Transformer Engine's, with FlashAttention and the fused kernels of the virtual width. TP and EP"
    yield "  messages wait, CP hides behind attention, and EP with moe-shared-expert-overlap behind the shared expert."
    yield "  Groups beyond a node go at the network's rate throughout."


def as_json(plan: Plan, twin: Plan | None) -> dict:
    """What ``--json`` writes of one layout; bytes and seconds, all predicted but the parameters."""
    layout_keys = ("tensor", "pipeline", "virtual", "expert", "context", "data", "micro_batch", "granularity", "block")
    return {
        "layout": {key: getattr(plan.shape, key) for key in layout_keys} | {"modules": list(plan.shape.modules)},
        "parameters_per_stage": [asdict(held) | {"total": held.total} for held in plan.held],
        "memory_per_stage": [asdict(memory) | {"total": memory.total} for memory in plan.memory],
        "sent_bytes": plan.step.sent,
        "step_seconds": plan.step.seconds,
        "step_parts": plan.step.parts,
        "tokens_per_second": plan.step.tokens_per_second,
        "step_seconds_without_virtual_width": twin and twin.step.seconds,
    }

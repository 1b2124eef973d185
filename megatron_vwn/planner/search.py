"""Layouts of a recipe that divide and fit, the fastest by the planner's prediction first.

Candidates change the layout, the micro-batch and recompute, never the model or the batch. Whether one divides is for
the recipe loader to say: every candidate passes its checks, and those that fail are dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from tqdm import tqdm

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops.costs import best_block
from megatron_vwn.planner.costs import Step, step_time
from megatron_vwn.planner.hardware import Rates
from megatron_vwn.planner.memory import Memory, rank_memory
from megatron_vwn.planner.parameters import NO_RECOMPUTE, exact, pieces, stage_parameters
from megatron_vwn.planner.shape import Parameters, Shape, shape_of
from megatron_vwn.recipes.recipe import Recipe

_MICRO_BATCHES = (1, 2, 4)
_VIRTUAL = (1, 2, 3, 4)
_NOTHING_RECOMPUTED = NO_RECOMPUTE | {"layers-per-stage": None}
# Tokens of a sequence that are worth a context-parallel rank of their own.
_TOKENS_PER_RANK = 4096
# Experts are not spread over more nodes than this.
_EXPERT_NODES = 4


@dataclass(frozen=True)
class Plan:
    """One layout with what is predicted of it.

    Attributes:
        recipe: with the layout.
        shape: the same in numbers.
        held: parameters of a rank of every pipeline stage.
        memory: of a rank of every pipeline stage.
        step: time and communication.
    """

    recipe: Recipe
    shape: Shape
    held: list[Parameters]
    memory: list[Memory]
    step: Step

    @property
    def worst(self) -> int:
        """The pipeline stage that needs most memory."""
        return max(range(self.shape.pipeline), key=lambda rank: self.memory[rank].total)

    def fits(self, rates: Rates) -> bool:
        """Whether the worst stage has enough memory."""
        return self.memory[self.worst].total <= rates.memory_gb * 1e9


def plan(recipe: Recipe, held: list[Parameters], rates: Rates) -> Plan:
    """Predict memory and time of a recipe as it is.

    Raises:
        VirtualWidthError: its layout does not divide, or the planner has no formulas for something in it.
    """
    shape = shape_of(recipe)
    memory = [rank_memory(shape, each, rank) for rank, each in enumerate(held)]
    return Plan(recipe, shape, held, memory, step_time(shape, held, rates))


def search(recipe: Recipe, rates: Rates, top: int) -> tuple[list[Plan], int]:
    """The best layouts that fit in memory.

    Args:
        recipe: on the GPUs in question.
        rates: what is assumed of them.
        top: how many to return.

    Returns:
        At most ``top`` plans, the fastest first, one for each (TP, PP, VPP, EP, CP), and how many layouts were looked
        at.

    Raises:
        VirtualWidthError: no layout divides.
    """
    parts: dict[int, dict[str, Parameters] | None] = {}
    best: dict[tuple, tuple[float, Recipe]] = {}
    looked, refused = 0, None
    plain = recipe if recipe.baseline else recipe.with_values({"vwn-recompute-block": None})
    for layout in tqdm(list(_layouts(recipe)), desc="layouts", unit="layout", disable=None, leave=False):
        for micro in _MICRO_BATCHES:
            candidate = plain.with_values(_NOTHING_RECOMPUTED | layout | {"micro-batch-size": micro})
            try:
                shape = shape_of(candidate)
                if shape.tensor not in parts:
                    parts[shape.tensor] = None  # once is enough to learn that Megatron refuses a size
                    parts[shape.tensor] = pieces(candidate)
            except VirtualWidthError as refusal:
                refused = refusal
                continue
            if parts[shape.tensor] is None:
                continue
            held = [stage_parameters(shape, parts[shape.tensor], rank) for rank in range(shape.pipeline)]
            for settings in _settings(shape):
                looked += 1
                seconds, name = _predicted(replace(shape, **settings), held, rates), tuple(layout.values())
                if seconds is None:
                    continue
                if name not in best or seconds < best[name][0]:
                    best[name] = seconds, candidate.with_values(_as_flags(settings))
                break  # what saves more memory takes more time
    if not looked:
        raise VirtualWidthError(f"no layout of {recipe.name} divides {recipe.world_size} GPUs; the last one: {refused}")
    return _built([one for _, one in sorted(best.values(), key=lambda entry: entry[0])], rates, top), looked


def _predicted(shape: Shape, held: list[Parameters], rates: Rates) -> float | None:
    """Seconds of a step, or None where a rank has not enough memory."""
    # Of stages that are alike the first one has the most micro-batches in flight.
    if any(rank_memory(shape, held[rank], rank).total > rates.memory_gb * 1e9 for rank in shape.unlike_stages()):
        return None
    return step_time(shape, held, rates).seconds


def _built(candidates: list[Recipe], rates: Rates, top: int) -> list[Plan]:
    """The first ``top`` that Megatron builds and that still fit with the parameters that were built."""
    plans: list[Plan] = []
    with tqdm(desc="building the fastest", total=top, unit="layout", disable=None, leave=False) as bar:
        for candidate in candidates:
            if len(plans) == top:
                break
            try:
                one = plan(candidate, exact(candidate), rates)
            except VirtualWidthError:  # a rule of Megatron's that the recipe loader does not have
                continue
            if one.fits(rates):
                plans.append(one)
                bar.update()
    return plans


def _layouts(recipe: Recipe) -> Iterator[dict[str, int]]:
    """(TP, PP, VPP, EP, CP) whose products divide the GPUs; TP stays within a node."""
    gpus, node = recipe.world_size, recipe.number("gpus-per-node")
    experts = recipe.number("num-experts") if recipe.get("num-experts") else 1
    tensors = [size for size in _divisors(node) if recipe.number("num-attention-heads") % size == 0]
    contexts = [
        2**power for power in range(5) if power == 0 or recipe.number("seq-length") >> power >= _TOKENS_PER_RANK
    ]
    ways = product(tensors, _divisors(gpus), _VIRTUAL, _divisors(experts), contexts)
    for tensor, pipeline, virtual, expert, context in ways:
        if gpus % (tensor * pipeline * context) or gpus % (expert * pipeline) or (virtual > 1 and pipeline == 1):
            continue
        # Ranks of one expert-parallel group are counted along TP and CP first; beyond a few nodes nobody would.
        if expert > _EXPERT_NODES * node:
            continue
        yield {
            "tensor-model-parallel-size": tensor,
            "pipeline-model-parallel-size": pipeline,
            "stages-per-rank": virtual,
            "expert-model-parallel-size": expert,
            "context-parallel-size": context,
        }


def _settings(shape: Shape) -> Iterator[dict[str, object]]:
    """Kinds of recompute, as fields of a shape, from the one that takes least time to the one that takes most."""
    longest = max(map(len, (*shape.stages, *shape.predictions)))
    kinds: list[dict[str, object]] = [{"granularity": ""}]
    if shape.experts:  # only they have a norm of their own
        kinds.append({"granularity": "selective", "modules": ("layernorm",)})
    kinds += [
        {"granularity": "selective", "modules": ("mlp", "moe") if shape.experts else ("mlp",)},
        {"granularity": "full", "method": "uniform", "recompute_layers": 1 if shape.predictions else min(2, longest)},
    ]
    blocks = [None, *sorted({2, 4, best_block(longest)})] if shape.width else [None]
    for kind, block in product(kinds, blocks):
        if not block or kind["granularity"] != "full":
            yield {"block": block} | kind


def _as_flags(settings: dict[str, object]) -> dict[str, object]:
    """Fields of a shape as keys of a recipe."""
    granularity = settings["granularity"]
    flags: dict[str, object] = {"recompute-granularity": granularity or None}
    if granularity == "full":
        flags |= {"recompute-method": settings["method"], "recompute-num-layers": settings["recompute_layers"]}
    elif granularity == "selective":
        flags["recompute-modules"] = list(settings["modules"])
    return flags | ({"vwn-recompute-block": settings["block"]} if settings["block"] else {})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]

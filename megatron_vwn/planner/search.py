"""Layouts of a recipe that divide and fit, the fastest by the planner's prediction first.

Candidates change the layout, the micro-batch and recompute, never the model or the batch. Whether one divides is for
the recipe loader to say: every candidate passes its checks, and those that fail are dropped.
"""

import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from tqdm import tqdm

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.planner.costs import Step, step_parts, step_time
from megatron_vwn.planner.hardware import Rates
from megatron_vwn.planner.memory import Memory, rank_memory
from megatron_vwn.planner.parameters import Pieces, check
from megatron_vwn.planner.recompute import NO_RECOMPUTE, kinds
from megatron_vwn.planner.shape import Parameters, Shape, shape_of
from megatron_vwn.recipes.recipe import Recipe

_MICRO_BATCHES = (1, 2, 4, 8)
_VIRTUAL = (1, 2, 3, 4)
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
        """Whether the worst stage leaves the margin of the memory."""
        return self.memory[self.worst].total <= rates.usable


def plan(recipe: Recipe, parts: Pieces, rates: Rates) -> Plan:
    """Predict memory and time of a recipe as it is.

    Raises:
        VirtualWidthError: its layout does not divide, or the planner has no formulas for something in it.
    """
    shape = shape_of(recipe, rates.imbalance)
    held = parts.ranks(shape)
    memory = [rank_memory(shape, each, rank) for rank, each in enumerate(held)]
    return Plan(recipe, shape, held, memory, step_time(shape, held, rates))


def search(recipe: Recipe, parts: Pieces, rates: Rates, top: int) -> tuple[list[Plan], int]:
    """The best layouts that leave the margin of the memory and that Megatron accepts.

    Args:
        recipe: on the GPUs in question.
        parts: of its model.
        rates: what is assumed of the GPUs.
        top: how many to return.

    Returns:
        At most ``top`` plans, the fastest first, one for each (TP, PP, VPP, EP, CP), and how many layouts and
        micro-batches divide.

    Raises:
        VirtualWidthError: none does.
    """
    candidates, plans = Candidates(recipe, parts, rates), []
    for candidate in candidates.fastest():
        try:
            check(candidate)
        except VirtualWidthError:  # a rule of Megatron's that the recipe loader does not have
            continue
        plans.append(plan(candidate, parts, rates))
        if len(plans) == top:
            break
    return plans, len(candidates)


class Candidates:
    """All layouts and micro-batches of a recipe that divide.

    Attributes:
        found: each without recompute, as a recipe and in numbers.
    """

    def __init__(self, recipe: Recipe, parts: Pieces, rates: Rates):
        """Divide a recipe in every way.

        Args:
            recipe: on the GPUs in question.
            parts: of its model.
            rates: what is assumed of the GPUs.

        Raises:
            VirtualWidthError: no layout divides.
        """
        self._parts, self._rates = parts, rates
        self.found: list[tuple[Recipe, Shape]] = []
        plain = recipe.with_values(NO_RECOMPUTE | {"layers-per-stage": None})
        plain, refused = plain if recipe.baseline else plain.with_values({"vwn-recompute-block": None}), None
        layouts = [each for each in _layouts(recipe) if each["tensor-model-parallel-size"] == 1 or parts.tensor > 1]
        for layout in tqdm(layouts, desc=f"layouts of {recipe.name}", unit="layout", disable=None, leave=False):
            for micro in sorted({*_MICRO_BATCHES, recipe.number("micro-batch-size")}):
                one = plain.with_values(layout | {"micro-batch-size": micro})
                try:
                    self.found.append((one, shape_of(one, rates.imbalance)))
                except VirtualWidthError as refusal:
                    refused = refusal
        if not self.found:
            raise VirtualWidthError(
                f"no layout of {recipe.name} divides {recipe.world_size} GPUs; the last one: {refused}"
            )

    def __len__(self) -> int:
        return len(self.found)

    def fastest(self) -> Iterator[Recipe]:
        """Those that leave the margin of the memory, the fastest first, one for each (TP, PP, VPP, EP, CP).

        Kinds of recompute are looked at only where nothing else is as fast as the layout would be without any, because
        none saves time.
        """
        # Seconds, and once recompute has been looked at the recipe with the kind that was chosen.
        queue: list[tuple[float, int, Recipe | None]] = [
            (self._seconds(shape), number, None) for number, (_, shape) in enumerate(self.found)
        ]
        heapq.heapify(queue)
        yielded = set()
        while queue:
            _, number, chosen = heapq.heappop(queue)
            shape = self.found[number][1]
            name = shape.tensor, shape.pipeline, shape.virtual, shape.expert, shape.context
            if name in yielded:
                continue
            if chosen is not None:
                yielded.add(name)
                yield chosen
            elif (best := self._with_recompute(number)) is not None:
                heapq.heappush(queue, (best[0], number, best[1]))

    def _seconds(self, shape: Shape) -> float:
        return sum(step_parts(shape, self._parts.ranks(shape), self._rates).values())

    def _with_recompute(self, number: int) -> tuple[float, Recipe] | None:
        """The fastest kind of recompute with which a layout leaves the margin of the memory."""
        recipe, plain = self.found[number]
        held, fitting = self._parts.ranks(plain), []
        for kind in kinds(plain, grouped=bool(recipe.get("moe-grouped-gemm"))):
            shape = replace(plain, **asdict(kind))
            # Of stages that are alike the first one has the most micro-batches in flight.
            ranks = shape.unlike_stages()
            if all(rank_memory(shape, held[rank], rank).total <= self._rates.usable for rank in ranks):
                fitting.append((self._seconds(shape), kind))
                if not kind.granularity and not kind.block:
                    break  # and nothing is faster
        if not fitting:
            return None
        seconds, kind = min(fitting, key=lambda entry: entry[0])
        return seconds, recipe.with_values(kind.flags())


def _layouts(recipe: Recipe) -> Iterator[dict[str, int]]:
    """(TP, PP, VPP, EP, CP) whose products divide the GPUs; TP stays within a node."""
    gpus, node = recipe.world_size, recipe.number("gpus-per-node")
    experts = recipe.number("num-experts") if recipe.get("num-experts") else 1
    heads = recipe.number("num-attention-heads")
    # Megatron's local layers, of which ranks are built here, cannot share a group of keys between ranks.
    groups = recipe.number("num-query-groups", 1) if recipe.get("group-query-attention") else heads
    tensors = [size for size in _divisors(node) if heads % size == groups % size == 0]
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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]

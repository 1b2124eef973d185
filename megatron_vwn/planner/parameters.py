"""Parameters of ranks, exactly: Megatron builds every part of a model once on the meta device, and they are added up.

Building whole ranks takes a second for each layout, and a search looks at hundreds. Importing this module imports
Megatron.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from megatron_vwn import cpu
from megatron_vwn.config import VirtualWidthError

# Ranks are built on the meta device, but Megatron asks for a GPU while it is imported.
cpu.install(announce=False)

from megatron_vwn.planner.recompute import NO_RECOMPUTE  # noqa: E402
from megatron_vwn.planner.shape import Parameters, Shape, counts, with_gpus  # noqa: E402
from megatron_vwn.planner.simulated_world import Count, simulated_world  # noqa: E402
from megatron_vwn.recipes.layout import check_layout, hybrid_pattern  # noqa: E402
from megatron_vwn.recipes.recipe import Recipe  # noqa: E402


def check(recipe: Recipe) -> None:
    """Let the training program's refusals and Megatron look at a layout; nothing is built.

    Raises:
        VirtualWidthError: it is refused.
    """
    with simulated_world(_arguments(recipe), recipe.world_size):
        pass


@dataclass(frozen=True)
class Pieces:
    """Parts of a model as one rank of a tensor-parallel group holds them, with a single expert.

    Attributes:
        tensor: ranks of the group.
        split: what is divided among them, by part: sublayers by their symbols, "table", "expansion", "end" (reduction
            and final norm), "head" and "predictions".
        whole: what each of them holds whole.
    """

    tensor: int
    split: dict[str, Parameters]
    whole: dict[str, Parameters]

    def of(self, part: str, tensor: int) -> Parameters:
        """A part on one of ``tensor`` ranks; nothing if the model has no such part."""
        split, whole = self.split.get(part, Parameters()), self.whole.get(part, Parameters())
        # One rank has nothing to sum its gradients with.
        summed = whole.summed if tensor > 1 else 0
        return Parameters(split.dense * self.tensor // tensor + whole.dense, whole.experts, summed)

    def ranks(self, shape: Shape) -> list[Parameters]:
        """What a rank of every pipeline stage holds.

        All ranks of a stage hold equally many, because everything that is divided among them divides.
        """
        return [self._rank(shape, rank) for rank in range(shape.pipeline)]

    def _rank(self, shape: Shape, rank: int) -> Parameters:
        held = [self.of(symbol, shape.tensor) * times for symbol, times in counts("".join(shape.chunks(rank)))]
        ends = ["table", "expansion"] if rank == 0 else []
        if rank == shape.pipeline - 1:
            ends += ["end", "predictions", "head"]
            # The last stage predicts with, or from, the embedding, of which it has a copy where it is not the first.
            ends += ["table"] * (shape.pipeline > 1 and bool(shape.predictions or shape.tied))
        whole = sum((*held, *(self.of(end, shape.tensor) for end in ends)), Parameters())
        return replace(whole, experts=whole.experts * shape.experts // shape.expert)

    def count(self, shape: Shape) -> Count:
        """The numbers of the whole model, of which ``shape`` says how many sublayers and experts there are."""
        sublayers = counts(shape.sublayers())
        experts = shape.experts * sum(self.of(symbol, 1).experts * times for symbol, times in sublayers)
        further = self.of("predictions", 1)
        mtp = further.dense + shape.experts * further.experts
        embedding, head = self.of("table", 1).dense + self.of("expansion", 1).dense, self.of("head", 1).dense
        dense = sum(self.of(symbol, 1).dense * times for symbol, times in sublayers)
        return Count(
            total=dense + experts + mtp + embedding + head + self.of("end", 1).dense,
            mtp=mtp,
            experts=experts,
            embedding=embedding,
            head=head,
            active_experts=experts * shape.top_k // max(1, shape.experts),
        )


def pieces(recipe: Recipe) -> Pieces:
    """Build every part of a recipe's model once; its layout does not matter.

    They are built for several tensor-parallel ranks if that can be, because only there does Megatron mark what is
    divided and what is summed.

    Raises:
        VirtualWidthError: Megatron refuses to build it.
    """
    node, own = recipe.number("gpus-per-node"), recipe.number("tensor-model-parallel-size", 1)
    # The recipe's own group may reach beyond a node.
    for tensor in (size for size in range(2, max(node, own) + 1) if node % size == 0 or size == own):
        try:
            return _pieces(recipe, tensor)
        except VirtualWidthError:  # then one rank is refused, too, or no layout has several
            continue
    return _pieces(recipe, 1)


def _pieces(recipe: Recipe, tensor: int) -> Pieces:
    one_stage = {"pipeline-model-parallel-size": 1, "stages-per-rank": 1, "layers-per-stage": None}
    pattern = hybrid_pattern(recipe.with_values(one_stage))
    trunk, _, further = pattern.partition("/")
    symbols = sorted(set(trunk) - {"|"})
    expert = recipe.number("num-experts") if recipe.get("num-experts") else 1
    gpus = math.lcm(tensor, expert)
    small = with_gpus(recipe.with_values({"gpus-per-node": gpus}), gpus).with_values(
        one_stage
        | {
            "hybrid-layer-pattern": "".join(symbols) + (f"/{further}" if further else ""),
            "tensor-model-parallel-size": tensor,
            "context-parallel-size": 1,
            "expert-model-parallel-size": expert,
            "micro-batch-size": 1,
            "global-batch-size": gpus,
        }
    )
    check_layout(small)
    split: defaultdict[str, Parameters] = defaultdict(Parameters)
    whole: defaultdict[str, Parameters] = defaultdict(Parameters)
    with simulated_world(_arguments(small), gpus) as world:
        for name, parameter in world.build(0).parameters():
            held = _of(parameter)
            # Experts are divided among expert-parallel ranks, whatever TP is.
            divided = getattr(parameter, "tensor_model_parallel", False) and not held.experts
            (split if divided else whole)[_part(name, symbols)] += held
    return Pieces(tensor, dict(split), dict(whole))


def _arguments(recipe: Recipe) -> list[str]:
    # Recompute changes no parameter, and some of it wants Transformer Engine.
    return recipe.with_values(NO_RECOMPUTE).arguments(transformer_engine=False)


def _of(parameter: torch.nn.Parameter) -> Parameters:
    number = parameter.numel()
    if not getattr(parameter, "allreduce", True):
        return Parameters(experts=number)
    return Parameters(dense=number, summed=number if getattr(parameter, "sequence_parallel", False) else 0)


def _part(name: str, symbols: list[str]) -> str:
    name = name.removeprefix("module.")
    if name.startswith("decoder.layers."):
        return symbols[int(name.split(".")[2])]
    for start, part in (
        ("decoder.", "end"),
        ("embedding.word_embeddings", "table"),
        ("embedding.", "expansion"),
        ("output_layer.", "head"),
        ("mtp.", "predictions"),
    ):
        if name.startswith(start):
            return part
    raise RuntimeError(f"{name} belongs to no part of the model that the planner knows")

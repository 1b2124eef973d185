"""Parameters of ranks, by building their models on the meta device.

``exact`` builds the ranks of a layout. A search looks at hundreds of layouts: for it ``pieces`` builds one sublayer of
every kind for a TP, with one expert, from which ``stage_parameters`` adds up any division into stages. The layouts that
are shown have all been built. Importing this module imports Megatron.
"""

import math
from collections import defaultdict
from dataclasses import replace

import torch
from tqdm import tqdm

from megatron_vwn import cpu

# Ranks are built on the meta device, but Megatron asks for a GPU while it is imported.
cpu.install(announce=False)

from megatron_vwn.planner.shape import Parameters, Shape, with_gpus  # noqa: E402
from megatron_vwn.planner.simulated_world import Count, SimulatedRank, simulated_world  # noqa: E402
from megatron_vwn.recipes.layout import hybrid_pattern  # noqa: E402
from megatron_vwn.recipes.recipe import Recipe  # noqa: E402

NO_RECOMPUTE = {
    "recompute-granularity": None,
    "recompute-method": None,
    "recompute-num-layers": None,
    "recompute-modules": None,
}


def of_rank(built: SimulatedRank) -> Parameters:
    """What a built rank holds."""
    return sum((_of(parameter) for _, parameter in built.parameters()), Parameters())


def exact(recipe: Recipe) -> list[Parameters]:
    """Build a rank of every pipeline stage of a recipe's layout.

    All ranks of a stage hold equally many, because everything that is divided among them divides.

    Raises:
        VirtualWidthError: Megatron refuses the layout.
    """
    with simulated_world(_arguments(recipe), recipe.world_size) as world:
        return [of_rank(world.build(rank)) for rank in world.stage_ranks()]


def exact_and_count(recipe: Recipe) -> tuple[list[Parameters], Count]:
    """As ``exact``, and the numbers of the whole model, which come from the same ranks."""
    held: list[Parameters] = []
    with simulated_world(_arguments(recipe), recipe.world_size) as world:
        stages = len(world.stage_ranks())
        with tqdm(desc=f"building {recipe.name}", total=stages, unit="stage", disable=None, leave=False) as bar:

            def look(built: SimulatedRank) -> None:
                held.append(of_rank(built))
                bar.update()

            return held, world.count(look)


def pieces(recipe: Recipe) -> dict[str, Parameters]:
    """What one rank with this recipe's TP and a single expert holds of each part of the model.

    Returns:
        Sublayers by their symbols, "table", "expansion", "end" (reduction and final norm), "head" and "predictions".
    """
    pattern = hybrid_pattern(recipe)
    trunk, _, further = pattern.partition("/")
    symbols = sorted(set(trunk) - {"|"})
    expert = recipe.number("num-experts") if recipe.get("num-experts") else 1
    gpus = math.lcm(recipe.number("tensor-model-parallel-size", 1), expert)
    small = with_gpus(recipe.with_values({"gpus-per-node": gpus}), gpus).with_values(
        {
            "hybrid-layer-pattern": "".join(symbols) + (f"/{further}" if further else ""),
            "pipeline-model-parallel-size": 1,
            "stages-per-rank": 1,
            "context-parallel-size": 1,
            "expert-model-parallel-size": expert,
            "micro-batch-size": 1,
            "global-batch-size": gpus,
        }
    )
    parts: defaultdict[str, Parameters] = defaultdict(Parameters)
    with simulated_world(_arguments(small), gpus) as world:
        for name, parameter in world.build(0).parameters():
            parts[_part(name, symbols)] += _of(parameter)
    return dict(parts)


def stage_parameters(shape: Shape, parts: dict[str, Parameters], rank: int) -> Parameters:
    """What a rank of this pipeline stage holds, from the pieces for its TP."""
    held = [parts[symbol] for chunk in shape.chunks(rank) for symbol in chunk]
    nothing = Parameters()
    if rank == 0:
        held += [parts["table"], parts.get("expansion", nothing)]
    if rank == shape.pipeline - 1:
        held += [parts["end"], parts.get("predictions", nothing), parts.get("head", nothing)]
        # The last stage predicts with, or from, the embedding, of which it has a copy where it is not the first, too.
        held += [parts["table"]] * (shape.pipeline > 1) * (1 if shape.predictions or shape.tied else 0)
    whole = sum(held, nothing)
    return replace(whole, experts=whole.experts * shape.experts // shape.expert)


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

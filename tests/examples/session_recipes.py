"""Builds recipes in simulated worlds, in a process of its own, and writes what was found as JSON to standard output."""

import json
import math
import sys
from dataclasses import asdict

from megatron_vwn import cpu

cpu.install()

from megatron_vwn.planner.simulated_world import simulated_world  # noqa: E402
from megatron_vwn.recipes.recipe import load_recipe, recipe_names  # noqa: E402

# Everything that is held anywhere, added up: experts over EP 8 on one stage; stages, TP 2 and EP 8 together.
SUMMED = {
    "moe-0.4b-4b": [],
    "moe-2.5b-25b": ["tensor-model-parallel-size=2", "pipeline-model-parallel-size=4", "stages-per-rank=2"],
}


def counted(name: str, baseline: bool) -> dict:
    recipe = load_recipe(name, baseline=baseline)
    with simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size) as world:
        count = world.count()
    numbers = asdict(count) | {"trunk": count.trunk, "active": count.active}
    return {"count": numbers, "stated": recipe.stated, "arguments": recipe.arguments(transformer_engine=True)}


def summed(name: str, overrides: list[str]) -> dict:
    """Parameters of the whole, and of all distinct shards of all ranks that are not copies of others."""
    recipe = load_recipe(name, overrides)
    with simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size) as world:
        total = world.count().total
        shards, coordinates = set(), set()
        for rank in world.distinct_ranks():
            built = world.build(rank)
            shards |= set(built.shards())
            coordinates.add((built.tensor, built.pipeline, built.expert))
        last = world.build(recipe.world_size - 1)
        copies = [shard for shard in last.shards() if shard not in shards]
    return {
        "overrides": overrides,
        "total": total,
        "shards": sum(math.prod(shard.shape) for shard in shards),
        "coordinates": len(coordinates),
        "last rank": [last.tensor, last.pipeline, last.expert],
        "not copies": len(copies),
    }


def refused(name: str, overrides: list[str]) -> str | None:
    recipe = load_recipe(name, overrides)
    try:
        with simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size):
            return None
    except ValueError as error:
        return str(error)


def main() -> None:
    answers = {
        "counted": {name: [counted(name, baseline) for baseline in (True, False)] for name in recipe_names()},
        "summed": {name: summed(name, overrides) for name, overrides in SUMMED.items()},
        "refused": refused("moe-0.4b-4b", ["recompute-modules=moe_act", "recompute-granularity=selective"]),
    }
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()

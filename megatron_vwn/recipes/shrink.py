"""A recipe made small by one factor, to be tried on a CPU before a cluster is asked for.

Width, experts, depth, vocabulary, sequence, batch and schedule are divided by the factor, down to floors below which
the structure would be another one: every kind of layer stays, so do the layer of multi-token prediction, grouped
queries, several experts per token, (m, n) and whatever the optimizer does. The layout becomes one process; overrides
choose another.
"""

from __future__ import annotations

from math import ceil, lcm
from typing import TYPE_CHECKING

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.layout import check_stages, layer_kinds

if TYPE_CHECKING:
    from megatron_vwn.recipes.recipe import Recipe

# Layers that are added until they fill the stages; more than 1024 stages are left to the check of the layout.
_MOST_TRIES = 4096
# Smallest value, and what the result is a multiple of.
_SIZES = {
    "kv-channels": (8, 8),
    "ffn-hidden-size": (32, 16),
    "moe-ffn-hidden-size": (16, 16),
    "moe-shared-expert-intermediate-size": (16, 16),
    "num-experts": (4, 4),
    "num-query-groups": (2, 2),
    "padded-vocab-size": (128, 128),
    "seq-length": (64, 64),
    "train-iters": (20, 1),
    "save-interval": (1, 1),
    "eval-interval": (1, 1),
    "eval-iters": (1, 1),
    "log-interval": (1, 1),
}
_ONE_PROCESS = {
    "nodes": 1,
    "gpus-per-node": 1,
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "stages-per-rank": 1,
    "layers-per-stage": None,
    "context-parallel-size": 1,
    "expert-model-parallel-size": 1,
    "micro-batch-size": 1,
}
_NO_DATA = {
    "mock-data": True,
    "tokenizer-type": "NullTokenizer",
    "train-data-path": None,
    "valid-data-path": None,
    "tokenizer-model": None,
    "data-cache-path": None,
}


def shrink_recipe(recipe: Recipe, factor: int) -> Recipe:
    """The recipe with every size divided by ``factor``, invented data, and one process.

    Args:
        recipe: with its overrides, which stay as they are.
        factor: at least 1.

    Raises:
        VirtualWidthError: the factor is no whole number of at least 1.
    """
    if factor < 1:
        raise VirtualWidthError(f"--shrink is {factor}: give a whole number of at least 1.")
    values = dict(_ONE_PROCESS)
    for key, (floor, multiple) in _SIZES.items():
        if recipe.get(key) and key not in recipe.overridden:
            values[key] = _divided(recipe.number(key), factor, floor, multiple)
    values["hidden-size"] = _divided(recipe.number("hidden-size"), factor, 32, lcm(8, recipe.number("vwn-m", 1)))
    if not any(key in recipe.overridden for key in ("train-data-path", "data-path", "tokenizer-model")):
        values |= _NO_DATA
    heads_per_group = max(1, recipe.number("num-attention-heads") // recipe.number("num-query-groups", 1))
    recipe = _without_overridden(recipe, values)
    return _without_overridden(recipe, _dependent(recipe, factor, heads_per_group))


def _dependent(recipe: Recipe, factor: int, heads_per_group: int) -> dict[str, object]:
    """Sizes that follow from others: they read the recipe with the others shrunk."""
    values: dict[str, object] = {"max-position-embeddings": recipe.number("seq-length")}
    if recipe.get("mock-data"):
        values["vocab-size"] = recipe.number("padded-vocab-size") - 1  # the null tokenizer adds its end of document
    if recipe.get("group-query-attention"):
        values["num-attention-heads"] = recipe.number("num-query-groups", 1) * heads_per_group
    else:
        values["num-attention-heads"] = _divided(recipe.number("num-attention-heads"), factor, 2, 2)
    if recipe.get("num-experts"):
        values["moe-router-topk"] = min(recipe.number("moe-router-topk", 2), recipe.number("num-experts") // 2)
    ranks = recipe.world_size // (
        recipe.number("tensor-model-parallel-size") * recipe.number("pipeline-model-parallel-size")
    )
    together = max(1, ranks) * recipe.number("micro-batch-size")
    values["global-batch-size"] = _divided(recipe.number("global-batch-size"), factor, together, together)
    values["layers"] = _layers(recipe, factor)
    return values


def _layers(recipe: Recipe, factor: int) -> list[list]:
    """Each kind of layer at least once; the last kind as often as it takes to fill the stages."""
    layers = [[max(1, count // factor), sublayers] for count, sublayers in layer_kinds(recipe)]
    stages = recipe.number("pipeline-model-parallel-size") * recipe.number("stages-per-rank", 1)
    for _ in range(min(4 * stages, _MOST_TRIES)):
        try:
            check_stages(recipe.with_values({"layers": layers}))
        except VirtualWidthError:
            layers[-1][0] += 1
        else:
            break
    return layers


def _divided(size: int, factor: int, floor: int, multiple: int) -> int:
    return max(floor, ceil(size / factor / multiple) * multiple)


def _without_overridden(recipe: Recipe, values: dict[str, object]) -> Recipe:
    return recipe.with_values({key: value for key, value in values.items() if key not in recipe.overridden})

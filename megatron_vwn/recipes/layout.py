"""The parallel layout of a recipe: its stages, and whether everything divides.

Megatron finds most of this out too, one assertion at a time, on every rank and after a minute of imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.width import check_virtual_width
from megatron_vwn.training.refusals.stages import (
    BLOCKS_OF_ONE,
    check_experts,
    check_pattern,
    recomputes_single_sublayers,
    stages_of_ranks,
)

if TYPE_CHECKING:
    from megatron_vwn.recipes.recipe import Recipe

# The pattern is one word of a command line, for which Linux has 131,071 bytes; half of them are for marks of stages.
_MOST_SUBLAYERS = 60_000


def hybrid_pattern(recipe: Recipe) -> str:
    """Megatron's ``--hybrid-layer-pattern``: layers, cut into pipeline stages by ``|``, and after ``/`` those of MTP.

    A layer is what is written together, usually two sublayers (``*E``), and is never cut. Stages are equal; if that
    needs it, the layer of multi-token prediction counts as one of the last stage's; ``layers-per-stage`` says
    otherwise.

    Raises:
        VirtualWidthError: the layers are no list of [how often, sublayers], do not divide into the stages, or are none
            that Megatron builds.
    """
    pattern = _pattern(recipe)
    check_pattern(pattern, recipe.get("num-experts"))
    return pattern


def _pattern(recipe: Recipe) -> str:
    written = recipe.get("hybrid-layer-pattern")
    if written is not None:
        _check_marks(recipe, str(written))
        return str(written)
    layers, mtp = _layers(recipe), recipe.get("mtp") or ""
    stages = _stages(recipe)
    sizes = _stage_sizes(recipe, len(layers), stages, 1 if mtp else 0)
    parts, begin = [], 0
    for size in sizes:
        parts.append("".join(layers[begin : begin + size]))
        begin += size
    return "|".join(parts) + (f"/{mtp}" if mtp else "")


def check_stages(recipe: Recipe) -> None:
    """Refuse layers that do not divide into stages, and a pipeline rank without experts in a model that has some.

    Raises:
        VirtualWidthError: the first fault.
    """
    _check_experts(recipe, _stages_of_ranks(recipe))


def _check_experts(recipe: Recipe, stages: list[list[str]]) -> None:
    check_experts(
        stages,
        recipe.get("moe-router-load-balancing-type", "aux_loss"),
        recipe.get("moe-aux-loss-coeff"),
        recipe.get("moe-z-loss-coeff"),
    )


def _stages_of_ranks(recipe: Recipe) -> list[list[str]]:
    ends = (
        recipe.number(key) if recipe.get(key) is not None else None
        for key in ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers")
    )
    return stages_of_ranks(hybrid_pattern(recipe), recipe.number("pipeline-model-parallel-size", 1), *ends)


def check_layout(recipe: Recipe) -> None:
    """Refuse a recipe whose sizes do not divide, in the order in which a user would want to hear of it.

    Raises:
        VirtualWidthError: the first fault.
    """
    world = recipe.world_size
    tensor, pipeline, context, expert, expert_tensor = (recipe.number(key, 1) for key in _DEGREES)
    if recipe.get("expert-tensor-parallel-size") is None:
        expert_tensor = tensor
    said = f"{world} GPUs ({recipe.number('nodes')} nodes of {recipe.number('gpus-per-node')})"
    _divide(world, tensor * pipeline * context, said, f"TP {tensor} x PP {pipeline} x CP {context}")
    if recipe.get("num-experts"):
        grid = f"ETP {expert_tensor} x EP {expert} x PP {pipeline} of experts"
        _divide(world, expert_tensor * expert * pipeline, said, grid)
    elif expert > 1:
        raise VirtualWidthError(f"expert-model-parallel-size is {expert}, but there are no experts: make it 1.")
    data = world // (tensor * pipeline * context)
    micro, batch = recipe.number("micro-batch-size"), recipe.number("global-batch-size")
    _divide(batch, micro * data, f"global-batch-size {batch}", f"micro-batch-size {micro} x {data} data-parallel ranks")
    _check_interleaving(recipe, pipeline, batch // (micro * data))
    for key, ways, why in (
        ("num-attention-heads", tensor, "tensor-parallel ranks"),
        ("hidden-size", tensor, "tensor-parallel ranks"),
        ("ffn-hidden-size", tensor, "tensor-parallel ranks"),
        ("moe-shared-expert-intermediate-size", tensor, "tensor-parallel ranks"),
        ("padded-vocab-size", tensor, "tensor-parallel ranks"),
        ("moe-ffn-hidden-size", expert_tensor, "expert-tensor-parallel ranks"),
        ("num-experts", expert, "expert-parallel ranks"),
        ("seq-length", (tensor if recipe.get("sequence-parallel") else 1) * context, "ranks that share a sequence"),
        ("seq-length", 2 * context if context > 1 else 1, "half sequences of context-parallel ranks"),
    ):
        if recipe.get(key) is not None:
            _divide(recipe.number(key), ways, f"{key} {recipe.get(key)}", f"{ways} {why}")
    _check_groups(recipe, tensor)
    if recipe.get("num-experts") and recipe.number("moe-router-topk", 2) > recipe.number("num-experts"):
        raise VirtualWidthError(
            f"moe-router-topk {recipe.get('moe-router-topk')} asks for more experts than num-experts "
            f"{recipe.get('num-experts')}: lower it."
        )
    if tensor > 1 and recipe.get("num-experts") and not recipe.get("sequence-parallel"):
        raise VirtualWidthError("experts on several tensor-parallel ranks need sequence-parallel: make it true.")
    stages = _stages_of_ranks(recipe)
    _check_experts(recipe, stages)
    _check_recompute(recipe, stages)
    check_virtual_width(recipe.flags)


_DEGREES = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "context-parallel-size",
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
)


def _divide(whole: int, parts: int, whole_said: str, parts_said: str) -> None:
    if whole % parts:
        product = f" = {parts}" if " x " in parts_said else ""
        raise VirtualWidthError(f"{whole_said} cannot be divided by {parts_said}{product}: change one of them.")


# What Megatron's flags about recompute take.
_RECOMPUTE = {
    "recompute-granularity": ("full", "selective"),
    "recompute-method": ("uniform", "block"),
    "recompute-modules": (
        "core_attn",
        "gdn_norm_out",
        "layernorm",
        "mla_up_proj",
        "mlp",
        "moe",
        "moe_act",
        "shared_experts",
    ),
}


def _check_recompute(recipe: Recipe, stages: list[list[str]]) -> None:
    for key, choices in _RECOMPUTE.items():
        given = recipe.get(key)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if value not in choices:
                raise VirtualWidthError(f"{key} has {value!r}: choose from {', '.join(choices)}.")
    granularity, method = recipe.get("recompute-granularity"), recipe.get("recompute-method")
    layers = recipe.number("recompute-num-layers", 1)
    single = recomputes_single_sublayers(granularity, method, layers, stages)
    if single and recipe.get("vwn-recompute-block"):
        raise VirtualWidthError(BLOCKS_OF_ONE)
    if (granularity, method) == ("full", "uniform") and "/" in hybrid_pattern(recipe) and layers > 1:
        raise VirtualWidthError(
            "Megatron recomputes a layer of multi-token prediction only with recompute-num-layers 1: make it 1."
        )


def _check_interleaving(recipe: Recipe, pipeline: int, micro_batches: int) -> None:
    per_rank = recipe.number("stages-per-rank", 1)
    if per_rank == 1:
        return
    if pipeline == 1:
        raise VirtualWidthError(
            f"stages-per-rank {per_rank} interleaves the stages of several pipeline ranks, and there is one: make it 1."
        )
    if pipeline == 2 and recipe.get("no-overlap-p2p-communication"):
        raise VirtualWidthError(
            "no-overlap-p2p-communication computes wrong results on two pipeline ranks of several stages each: drop it."
        )
    group = recipe.number("microbatch-group-size-per-virtual-pipeline-stage", pipeline)
    if micro_batches < group or 0 < micro_batches % group < pipeline:
        raise VirtualWidthError(
            f"a step has {micro_batches} micro-batches, which interleaved stages cannot take {group} at a time: choose "
            f"global-batch-size for a multiple of {group} micro-batches, or stages-per-rank 1."
        )


def _check_groups(recipe: Recipe, tensor: int) -> None:
    if not recipe.get("group-query-attention"):
        return
    heads, groups = recipe.number("num-attention-heads"), recipe.number("num-query-groups", 1)
    _divide(heads, groups, f"num-attention-heads {heads}", f"num-query-groups {groups}")
    if groups % tensor and tensor % groups:
        raise VirtualWidthError(
            f"num-query-groups {groups} and {tensor} tensor-parallel ranks do not divide each other: change one."
        )


def _stages(recipe: Recipe) -> int:
    return recipe.number("pipeline-model-parallel-size", 1) * recipe.number("stages-per-rank", 1)


def layer_kinds(recipe: Recipe) -> list[tuple[int, str]]:
    """How often each kind of layer comes, and its sublayers.

    Raises:
        VirtualWidthError: the recipe has no such list.
    """
    written = recipe.get("layers")
    if not isinstance(written, list) or not written:
        raise VirtualWidthError(f"{recipe.name} has no layers: write a list such as [[1, '*-'], [23, '*E']].")
    for entry in written:
        if not _is_layer_kind(entry):
            raise VirtualWidthError(
                f"layers of {recipe.name} has the entry {entry!r}: write [how often, sublayers] such as [23, '*E']."
            )
    sublayers = sum(count * len(kind) for count, kind in written)
    if sublayers > _MOST_SUBLAYERS:
        raise VirtualWidthError(
            f"layers of {recipe.name} has {sublayers} sublayers, more than fit on a command line: give at most "
            f"{_MOST_SUBLAYERS}."
        )
    return [tuple(entry) for entry in written]


def _is_layer_kind(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        return False
    return type(entry[0]) is int and entry[0] > 0 and entry[1] != "" and not set(entry[1]) & set("|/")


def _layers(recipe: Recipe) -> list[str]:
    return [sublayers for count, sublayers in layer_kinds(recipe) for _ in range(count)]


def _stage_sizes(recipe: Recipe, layers: int, stages: int, last: int) -> list[int]:
    written = recipe.get("layers-per-stage")
    if written is not None:
        if not isinstance(written, list) or not all(type(size) is int and size > 0 for size in written):
            raise VirtualWidthError(
                f"layers-per-stage is {written!r}: give a list of numbers of at least 1, one per stage."
            )
        if len(written) != stages or sum(written) != layers:
            raise VirtualWidthError(
                f"layers-per-stage {written} has {sum(written)} layers in {len(written)} stages, and the recipe has "
                f"{layers} in {stages}: correct it, or make it null."
            )
        return written
    if layers % stages == 0:
        return [layers // stages] * stages
    size = (layers + last) // stages
    if (layers + last) % stages == 0 and size > last:
        return [size] * (stages - 1) + [size - last]
    beside = " and the one of multi-token prediction" if last else ""
    raise VirtualWidthError(
        f"{layers} layers{beside} cannot be divided into {stages} equal stages: change pipeline-model-parallel-size or "
        "stages-per-rank, or give layers-per-stage."
    )


def _check_marks(recipe: Recipe, pattern: str) -> None:
    """A pattern of the user's own must have the stages that the layout has."""
    marked, ranks = pattern.count("|") + 1, recipe.number("pipeline-model-parallel-size", 1)
    if recipe.get("stages-per-rank") not in (None, 1) and marked != _stages(recipe):
        raise VirtualWidthError(
            f"hybrid-layer-pattern has {marked} stages, but the layout {_stages(recipe)}: set stages-per-rank to 1 or "
            "write as many."
        )
    if marked > 1 and marked % ranks:
        raise VirtualWidthError(
            f"hybrid-layer-pattern has {marked} stages, which {ranks} pipeline ranks cannot share: change one of them."
        )

"""Compares the planner with models that are built and run, in a process of its own; writes JSON to standard output.

Ranks of several run in one process: torch's fake backend moves nothing, but shapes, and so bytes, are those of a real
run, whatever the values.
"""

import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import megatron_vwn_tools._plan_parameters as parameters  # first, because it emulates a GPU where there is none
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron_vwn_tools._benchmark_memory import footprint
from megatron_vwn_tools._plan_activations import connection_bytes, edge_bytes, sublayer_bytes
from megatron_vwn_tools._plan_costs import micro_batch_bytes, micro_batch_seconds
from megatron_vwn_tools._plan_hardware import Rates
from megatron_vwn_tools._plan_memory import kept_bytes
from megatron_vwn_tools._plan_search import search
from megatron_vwn_tools._plan_shape import shape_of, with_gpus
from megatron_vwn_tools._recipe import Recipe, load_recipe
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vwn.training import simulated_world as simulation
from megatron_vwn.training.model_config import VirtualWidthModelBuilder

SMALL = {
    "hidden-size": 256,
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "kv-channels": 32,
    "ffn-hidden-size": 384,
    "moe-ffn-hidden-size": 96,
    "moe-shared-expert-intermediate-size": 96,
    "num-experts": 8,
    "moe-router-topk": 2,
    "padded-vocab-size": 512,
    "seq-length": 64,
    "max-position-embeddings": 64,
    "micro-batch-size": 2,
    "cross-entropy-loss-fusion": False,
}
LAYERS = [[1, "*-"], [1, "*E"]]
# Guesses of one core; only the order of the times is looked at.
CPU = Rates(memory_gb=8, matrix_tflops=0.1, memory_gbs=3, nvlink_gbs=1, network_gbs=1, expert_share=0.55)


def small(layers: list = LAYERS, *, baseline: bool = False, **values) -> Recipe:
    """A model of some 100,000 parameters in the proportions of moe-a3.3b; keys may be written with underscores."""
    values = {key.replace("_", "-"): value for key, value in values.items()}
    if not any("E" in sublayers for _, sublayers in layers):
        values |= {key: None for key in load_recipe("moe-a3.3b").sections["model"] if "moe-" in key}
        values |= {"num-experts": None, "moe-token-dispatcher-type": None, "mtp": None, "expert-model-parallel-size": 1}
    recipe = load_recipe("moe-a3.3b", shrink=64, baseline=baseline).with_values(SMALL | parameters.NO_RECOMPUTE)
    gpus = math.prod(values.pop("gpus", (1,)))
    recipe = recipe.with_values({"layers": layers, "global-batch-size": 16 * gpus, "gpus-per-node": gpus} | values)
    return with_gpus(recipe, gpus)


def wide(**values) -> dict:
    return {"vwn_m": 2, "vwn_n": 8} | values


# Parameters


def coordinates(recipe: Recipe) -> dict:
    """Held by every distinct rank, as the planner says and as built, and the sum over shards that are not copies."""
    shape = shape_of(recipe)
    predicted, whole = parameters.exact_and_count(recipe)
    parts = parameters.pieces(recipe)
    added_up = [parameters.stage_parameters(shape, parts, rank) for rank in range(shape.pipeline)]
    different, shards, seen = [], set(), set()
    with simulation.simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size) as world:
        for rank in world.distinct_ranks():
            built = world.build(rank)
            shards |= set(built.shards())
            seen.add((built.tensor, built.pipeline, built.expert))
            held = sum(parameter.numel() for _, parameter in built.parameters())
            if held != predicted[built.pipeline].total:
                different.append([rank, held, predicted[built.pipeline].total])
    return {
        "coordinates": len(seen),
        "different": different,
        "total": whole.total,
        "shards": sum(math.prod(shard.shape) for shard in shards),
        "pieces differ": [[str(a), str(b)] for a, b in zip(predicted, added_up, strict=True) if a != b],
    }


# Activations


@contextmanager
def model_of(recipe: Recipe):
    """A rank's model with memory, and a function that runs its forward pass to the loss."""
    with simulation.simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size) as world:
        simulation._join(world.args, 0)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = VirtualWidthModelBuilder(world.model_config).build_model(groups, True, True)
        shape = shape_of(recipe)
        tokens = torch.randint(0, 100, (shape.micro_batch, shape.sequence))
        positions = torch.arange(shape.sequence).expand_as(tokens)
        mask = torch.ones(1, 1, shape.sequence, shape.sequence, dtype=torch.bool).triu(1)
        yield model, lambda: model(tokens, positions, mask, labels=tokens).float().sum()


def saved(recipe: Recipe) -> dict:
    """Bytes of distinct storages that autograd saves, parameters left out, by the module that ran; and as predicted."""
    with model_of(recipe) as (model, forward):
        own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        storages: dict[int, tuple[str, torch.UntypedStorage]] = {}
        running = ["head"]
        for name, module in model.named_modules():
            place = _place(name)
            if place:
                module.register_forward_pre_hook(lambda *_, place=place: running.append(place))
                module.register_forward_hook(lambda *_: running.pop() and None)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages.setdefault(storage.data_ptr(), (running[-1], storage))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        measured = Counter()
        for place, storage in storages.values():
            measured[place] += storage.nbytes()
        del loss
    return {"measured": measured, "predicted": _predicted(recipe)}


def _place(name: str) -> str | None:
    if found := re.fullmatch(r"decoder\.layers\.(\d+)", name):
        return f"layer {found[1]}"
    if re.fullmatch(r"mtp\.layers\.0\.mtp_model_layer\.layers\.\d+", name):
        return "sublayers of predictions"
    if name == "mtp":
        return "predictions"
    if name in ("decoder.final_norm", "decoder.reduction"):
        return "end"
    return {"embedding": "embedding", "output_layer": "head"}.get(name)


def _predicted(recipe: Recipe) -> dict[str, float]:
    shape = shape_of(recipe)
    wide_bytes = connection_bytes(shape, "local", 1)
    one = {symbol: sublayer_bytes(symbol, shape, "local") + wide_bytes for symbol in "*-E"}
    edges = edge_bytes(shape, "local", first=True, last=True)
    layers = {f"layer {number}": one[symbol] for number, symbol in enumerate(shape.sublayers())}
    return layers | edges | {"sublayers of predictions": sum(one[symbol] for symbol in "".join(shape.predictions))}


def alive(recipe: Recipe) -> dict:
    """Bytes that live between the passes, whoever holds them: what hooks cannot see in blocks and checkpoints."""
    with model_of(recipe) as (model, forward):
        forward().backward()  # gradients have their memory
        measured = footprint(torch.device("cpu"), forward, lambda loss: loss.backward()).kept
        del model
    shape = shape_of(recipe)
    rows = [*shape.chunks(0), *shape.predictions]
    edges = sum(edge_bytes(shape, "local", first=True, last=True).values())
    return {"measured": measured, "predicted": edges + sum(sum(kept_bytes(shape, row, "local")) for row in rows)}


# Communication


class Collectives(TorchDispatchMode):
    """Bytes that a ring sends for every collective, by what Megatron calls the group."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("c10d::"):
            group = next(
                (
                    ProcessGroup.unbox(arg)
                    for arg in args
                    if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
                ),
                None,
            )
            largest = max((_bytes(arg) for arg in args), default=0)
            if group is not None and group.size() > 1:
                times = 2 if name == "c10d::allreduce_" else 1
                self.sent[group.group_desc] += times * largest * (group.size() - 1) / group.size()
        return func(*args, **(kwargs or {}))


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def communicated(recipe: Recipe) -> dict:
    """One micro-batch's collectives, forward and backward."""
    with model_of(recipe) as (_, forward), Collectives() as collectives:
        forward().backward()
    return {"measured": collectives.sent, "predicted": micro_batch_bytes(shape_of(recipe), 0)}


# Time


def ranking() -> dict:
    """Median seconds of a step of several models, run in turns, and what the planner predicts with rates of a CPU."""
    dense, routed = [[2, "*-"]], [[2, "*E"]]
    sizes = {
        "hidden_size": 256,
        "ffn_hidden_size": 1024,
        "seq_length": 128,
        "max_position_embeddings": 128,
        "mtp": None,
    }
    sizes |= {"moe_ffn_hidden_size": 1024, "moe_shared_expert_intermediate_size": 1024}
    variants = {
        "baseline": small(dense, baseline=True, **sizes),
        "(2, 3)": small(dense, **sizes, **wide(vwn_n=3)),
        "(2, 8)": small(dense, **sizes, **wide()),
        "baseline with experts": small(routed, baseline=True, moe_router_topk=4, **sizes),
        "(2, 8) of five times the layers": small([[10, "*-"]], **sizes, **wide()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3):
        for name, recipe in variants.items():
            with model_of(recipe) as (_, forward):
                forward().backward()
                for _ in range(2):
                    begin = time.perf_counter()
                    forward().backward()
                    seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "measured": statistics.median(seconds[name]),
            "predicted": sum(micro_batch_seconds(shape_of(recipe), 0, CPU).values()),
        }
        for name, recipe in variants.items()
    }


def found() -> list[dict]:
    """The best layouts on four GPUs."""
    recipe = small([[1, "*-"], [3, "*E"]], gpus=(4,), micro_batch_size=1, **wide())
    plans, _ = search(recipe, replace(CPU, memory_gb=0.06), 8)
    return [
        {
            "layout": [plan.shape.tensor, plan.shape.pipeline, plan.shape.virtual, plan.shape.expert],
            "recipe": {**plan.recipe.sections["layout"], **plan.recipe.sections["optimizer"]},
            "pattern": "|".join(plan.shape.stages),
            "seconds": plan.step.seconds,
            "memory": plan.memory[plan.worst].total / 1e9,
        }
        for plan in plans
    ]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    chosen = {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}
    tp, layers = {"tensor_model_parallel_size": 2}, [[1, "*-"], [3, "*E"]]
    tp_pp_ep = tp | {"gpus": (8,), "pipeline_model_parallel_size": 2, "layers_per_stage": [2, 2]}
    pp_ep = {"gpus": (8,), "pipeline_model_parallel_size": 4, "layers_per_stage": [1] * 4, "mtp": None}
    dense = [[1, "*-"]]
    answers = {
        "parameters": {
            "TP2 PP2 EP4": coordinates(small(layers, **tp_pp_ep, expert_model_parallel_size=4, **wide())),
            "TP2 PP2 EP2, (2, 3)": coordinates(
                small(layers, **tp_pp_ep, expert_model_parallel_size=2, **wide(vwn_n=3))
            ),
            "PP4 EP2, baseline": coordinates(small([[4, "*E"]], **pp_ep, expert_model_parallel_size=2, baseline=True)),
        },
        "saved": {"baseline": saved(small(baseline=True)), "(2, 8)": saved(small(**wide()))},
        "alive": {
            "blocks of 2": alive(small(**wide(vwn_recompute_block=2))),
            "blocks of 3, (2, 3)": alive(small(**wide(vwn_recompute_block=3, vwn_n=3))),
            "blocks of 2, TP2": alive(small(gpus=(2,), **tp, **wide(vwn_recompute_block=2))),
            "full recompute, baseline": alive(small(baseline=True, **full)),
            "full recompute": alive(small(**wide(**full))),
            "selective recompute": alive(small(**wide(**chosen))),
        },
        "communicated": {
            "TP2 EP4, baseline": communicated(small(gpus=(4,), **tp, expert_model_parallel_size=4, baseline=True)),
            "TP2 EP2": communicated(small(gpus=(4,), **tp, expert_model_parallel_size=2, **wide())),
            "TP2, width": communicated(small(dense, gpus=(2,), **tp, sequence_parallel=False, **wide())),
            "TP2, baseline without sequence parallelism": communicated(
                small(dense, gpus=(2,), **tp, sequence_parallel=False, baseline=True)
            ),
        },
        "found": found(),
        "ranking": ranking(),
    }
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()

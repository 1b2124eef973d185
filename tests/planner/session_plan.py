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
from unittest import mock

import torch

from megatron_vwn import cpu

# Before Megatron is imported, which looks for a GPU.
cpu.install(announce=False)

from megatron.core.pipeline_parallel import schedules  # noqa: E402
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.training import num_floating_point_operations  # noqa: E402
from torch.distributed import ProcessGroup  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megatron_vwn.benchmark.memory import footprint  # noqa: E402
from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.parallel.pipeline import WideP2PCommunicator  # noqa: E402
from megatron_vwn.planner import parameters  # noqa: E402
from megatron_vwn.planner import simulated_world as simulation  # noqa: E402
from megatron_vwn.planner.activations import connection_bytes, edge_bytes, sublayer_bytes  # noqa: E402
from megatron_vwn.planner.costs import edge_flops, micro_batch_bytes, micro_batch_seconds, rows, sublayer_flops  # noqa: E402
from megatron_vwn.planner.hardware import HARDWARE, Rates  # noqa: E402
from megatron_vwn.planner.memory import in_flight, kept_bytes, message_bytes  # noqa: E402
from megatron_vwn.planner.print import layout  # noqa: E402
from megatron_vwn.planner.recompute import NO_RECOMPUTE, kinds  # noqa: E402
from megatron_vwn.planner.search import Candidates, plan, search  # noqa: E402
from megatron_vwn.planner.shape import Parameters, shape_of, with_gpus  # noqa: E402
from megatron_vwn.recipes.layout import check_layout  # noqa: E402
from megatron_vwn.recipes.recipe import Recipe, load_recipe, recipe_names  # noqa: E402
from megatron_vwn.training.model import VirtualWidthModelBuilder  # noqa: E402

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
    "vwn-recompute-block": None,
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
    recipe = load_recipe("moe-a3.3b", shrink=64, baseline=baseline).with_values(SMALL | NO_RECOMPUTE)
    gpus = math.prod(values.pop("gpus", (1,)))
    recipe = recipe.with_values({"layers": layers, "global-batch-size": 16 * gpus, "gpus-per-node": gpus} | values)
    return with_gpus(recipe, gpus)


def wide(**values) -> dict:
    return {"vwn_m": 2, "vwn_n": 8} | values


# Parameters


def coordinates(recipe: Recipe) -> dict:
    """Held by every distinct rank and in all, added up of parts and as built, and the sum over shards that are not
    copies."""
    shape, parts = shape_of(recipe), parameters.pieces(recipe)
    different, summed, shards, seen = [], [], set(), set()
    with simulation.simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size) as world:
        count = world.count()
        for rank in world.distinct_ranks():
            built = world.build(rank)
            shards |= set(built.shards())
            seen.add((built.tensor, built.pipeline, built.expert))
            held = sum((_held(parameter) for _, parameter in built.parameters()), Parameters())
            summed.append(held.summed)
            if held != parts.ranks(shape)[built.pipeline]:
                different.append([rank, str(held), str(parts.ranks(shape)[built.pipeline])])
    return {
        "coordinates": len(seen),
        "different": different,
        "summed": min(summed),
        "counts": [str(parts.count(shape)), str(count)],
        "total": count.total,
        "shards": sum(math.prod(shard.shape) for shard in shards),
    }


def _held(parameter: torch.nn.Parameter) -> Parameters:
    number = parameter.numel()
    if not getattr(parameter, "allreduce", True):
        return Parameters(experts=number)
    # Those whose gradients Megatron sums over tensor-parallel ranks after the backward pass are marked.
    return Parameters(dense=number, summed=number * getattr(parameter, "sequence_parallel", False))


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


# Against Megatron's own arithmetic and rules


def flops() -> dict:
    """Of a step of ordinary models, by Megatron and by the planner; Megatron counts neither routers nor fusions."""
    found = {}
    for name, recipe in {
        "experts and a further prediction": small([[1, "*-"], [2, "*E"]], baseline=True),
        "dense, ungated": small([[3, "*-"]], baseline=True, swiglu=False),
    }.items():
        shape = shape_of(recipe)
        products = sum(
            sum(sublayer_flops(shape, symbol).values())
            - (2 * shape.tokens * shape.hidden * shape.experts if symbol == "E" else 0)
            for row, _ in rows(shape, 0)
            for symbol in row
        )
        with simulation.simulated_world(recipe.arguments(transformer_engine=False), 1) as world:
            megatrons = num_floating_point_operations(world.args, world.args.global_batch_size)
        found[name] = [megatrons, 3 * shape.micro_batches * (products + edge_flops(shape, 0)["head"])]
    return found


def flying() -> list:
    """Micro-batches per virtual stage when a rank's first backward pass begins, by Megatron's schedules and by us."""
    shape, found = shape_of(small([[1, "*-"]], baseline=True)), []
    for ranks, virtual, micro_batches in ((2, 1, 8), (4, 1, 2), (2, 2, 8), (4, 2, 4), (4, 3, 16), (8, 2, 8)):
        one = replace(shape, pipeline=ranks, virtual=virtual, batch=micro_batches * shape.micro_batch)
        for rank in range(ranks):
            group = mock.Mock(**{"size.return_value": ranks, "rank.return_value": rank})
            pipe = mock.Mock(pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None)
            total, _, warmup, _ = schedules.get_pp_rank_microbatches(
                micro_batches, virtual, ranks, p2p_communicator=pipe
            )
            table = schedules.get_schedule_table(micro_batches, virtual, ranks)[: min(warmup + 1, total)]
            stages = Counter(stage for _, stage in table)
            found.append([f"{ranks} {virtual} {rank}", [stages[each] for each in range(virtual)], in_flight(one, rank)])
    return found


def messages() -> dict:
    """Bytes of a state that a pipeline stage sends, as the communicator shapes it and as predicted."""
    layers = {"layers": [[2, "*-"]], "pipeline_model_parallel_size": 2}
    tp = layers | {"gpus": (4,), "tensor_model_parallel_size": 2}
    found = {}
    for name, recipe in {
        "(2, 8)": small(gpus=(2,), **layers, **wide()),
        "(2, 3), TP2": small(**tp, **wide(vwn_n=3)),
        "width": small(**tp, sequence_parallel=False, **wide()),
    }.items():
        with simulation.simulated_world(recipe.arguments(transformer_engine=False), recipe.world_size) as world:
            simulation._join(world.args, 0)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            config = world.model_config.transformer
            shapes = schedules.get_tensor_shapes(
                seq_length=world.args.seq_length,
                micro_batch_size=world.args.micro_batch_size,
                decoder_seq_length=None,
                config=config,
                tp_group=groups.tp,
                cp_group=groups.cp,
            )
            with mock.patch.object(P2PCommunicator, "_communicate") as sent:
                WideP2PCommunicator(groups.pp, config, world.virtual_width)._communicate(tensor_shape=shapes[0])
        elements = math.prod(sent.call_args.kwargs["tensor_shape"])
        found[name] = [elements * config.pipeline_dtype.itemsize, message_bytes(shape_of(recipe))]
    return found


def verdicts() -> list:
    """Why the recipe loader and why Megatron does not take a layout of four GPUs; None where it does."""
    found = []
    for layout_of in (
        {}, {"tensor": 2, "pipeline": 2, "expert": 2}, {"pipeline": 4}, {"pipeline": 2, "virtual": 2, "expert": 2},
        {"tensor": 4, "expert": 4}, {"tensor": 3}, {"tensor": 2, "pipeline": 4}, {"expert": 3}, {"pipeline": 3},
        {"pipeline": 2, "expert": 4}, {"batch": 6}, {"tensor": 4, "heads": 6}, {"expert": 4, "experts": 6},
        {"pipeline": 2, "layers": [[2, "*-"], [2, "*E"]]},
    ):  # fmt: skip
        each = {
            "tensor": 1,
            "pipeline": 1,
            "virtual": 1,
            "expert": 1,
            "batch": 16,
            "heads": 4,
            "experts": 8,
        } | layout_of
        values = {
            "tensor-model-parallel-size": each["tensor"],
            "pipeline-model-parallel-size": each["pipeline"],
            "stages-per-rank": each["virtual"],
            "expert-model-parallel-size": each["expert"],
            "global-batch-size": each["batch"],
            "num-attention-heads": each["heads"],
            "num-query-groups": each["heads"],
            "num-experts": each["experts"],
            "layers": each.get("layers", [[4, "*E"]]),
        }
        recipe = small([[4, "*E"]], mtp=None, micro_batch_size=1, gpus=(4,), **wide()).with_values(values)
        ours = megatrons = None
        try:
            check_layout(recipe)
        except VirtualWidthError as refusal:
            ours = str(refusal)
        # The stages that the loader would not cut, for Megatron to look at.
        stages = each["pipeline"] * each["virtual"]
        layers = [sublayers for count, sublayers in values["layers"] for _ in range(count)]
        cut = ["".join(layers[4 * number // stages : 4 * (number + 1) // stages]) for number in range(stages)]
        words = recipe.with_values({"hybrid-layer-pattern": "|".join(cut), "stages-per-rank": 1})
        try:
            with simulation.simulated_world(words.arguments(transformer_engine=False), 4) as world:
                for rank in world.stage_ranks():
                    world.build(rank)
        except (VirtualWidthError, AssertionError, RuntimeError) as refusal:
            megatrons = str(refusal) or repr(refusal)
        found.append([str(layout_of), ours, megatrons])
    return found


def built() -> dict:
    """Of the fastest layouts of two of the paper's recipes, cut short: parameters of all distinct shards, and all."""
    found = {}
    for name, memory in (("moe-0.4b-4b", 3), ("moe-a3.3b", 6)):
        recipe = load_recipe(name).with_values({"layers": [[1, "*-"], [3, "*E"]], "num-experts": 8, "mtp": None})
        recipe = with_gpus(recipe.with_values({"stages-per-rank": 1, "pipeline-model-parallel-size": 1}), 8)
        plans, _ = search(recipe, parameters.pieces(recipe), replace(HARDWARE["h100"], memory_gb=memory), 2)
        for one in plans:
            # As Megatron would run it, recompute included, but for what wants Transformer Engine.
            wanting = one.shape.granularity == "selective" and "layernorm" in one.shape.modules
            own = one.recipe.with_values(NO_RECOMPUTE) if wanting else one.recipe
            shards = set()
            with simulation.simulated_world(own.arguments(transformer_engine=False), 8) as world:
                total = world.count().total
                for rank in world.distinct_ranks():
                    shards |= set(world.build(rank).shards())
            found[f"{name} {layout(one.shape)}"] = [sum(math.prod(shard.shape) for shard in shards), total]
    return found


# Time


def ranking() -> dict:
    """Median seconds of a step of several models, run in turns, and what the planner predicts with rates of a CPU.

    Each takes about twice as long as the one before, so that a busy machine does not change their order.
    """
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
        # Whose MLP takes longer than all that a virtual width adds, its connections apart.
        "baseline with wider MLP": small(dense, baseline=True, **(sizes | {"ffn_hidden_size": 1384})),
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


def found() -> dict:
    """The best layouts on four GPUs, and the time of the best among all layouts with all kinds of recompute."""
    recipe = small([[1, "*-"], [3, "*E"]], gpus=(4,), micro_batch_size=1, **wide())
    parts, rates = parameters.pieces(recipe), replace(CPU, memory_gb=0.066, memory_margin=0.1)
    plans, _ = search(recipe, parts, rates, 8)
    every = [
        plan(candidate.with_values(kind.flags()), parts, rates)
        for candidate, shape in Candidates(recipe, parts, rates).found
        for kind in kinds(shape, grouped=True)
    ]
    return {
        "best of all": min(each.step.seconds for each in every if each.fits(rates)),
        "plans": [
            {
                "layout": [each.shape.tensor, each.shape.pipeline, each.shape.virtual, each.shape.expert],
                "recipe": {**each.recipe.sections["layout"], **each.recipe.sections["optimizer"]},
                "pattern": "|".join(each.shape.stages),
                "seconds": each.step.seconds,
                "memory": each.memory[each.worst].total / 1e9,
            }
            for each in plans
        ],
    }


def recipes() -> dict[str, list[float]]:
    """Predicted seconds of each recipe's layout and of the best that its planner finds, and whether its own fits."""
    answers = {}
    for name in recipe_names():
        recipe, rates = load_recipe(name), HARDWARE["h100"]
        parts = parameters.pieces(recipe)
        own, best = plan(recipe, parts, rates), next(Candidates(recipe, parts, rates).fastest())
        answers[name] = [own.step.seconds, plan(best, parts, rates).step.seconds, own.fits(rates)]
    return answers


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    chosen = {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}
    tp, layers = {"tensor_model_parallel_size": 2}, [[1, "*-"], [3, "*E"]]
    tp_pp_ep = tp | {"gpus": (8,), "pipeline_model_parallel_size": 2, "layers_per_stage": [2, 2]}
    pp_ep = {"gpus": (8,), "pipeline_model_parallel_size": 4, "layers_per_stage": [1] * 4, "mtp": None}
    tp_pp = tp | {"gpus": (4,), "pipeline_model_parallel_size": 2}
    by_width_4 = {"sequence_parallel": False, "num_query_groups": 4}
    dense, by_width = [[1, "*-"]], tp | {"gpus": (2,), "sequence_parallel": False}
    answers = {
        "parameters": {
            "TP2 PP2 EP4": coordinates(small(layers, **tp_pp_ep, expert_model_parallel_size=4, **wide())),
            "TP2 PP2 EP2, (2, 3)": coordinates(
                small(layers, **tp_pp_ep, expert_model_parallel_size=2, **wide(vwn_n=3))
            ),
            "PP4 EP2, baseline": coordinates(small([[4, "*E"]], **pp_ep, expert_model_parallel_size=2, baseline=True)),
            "TP2 PP2 beyond a node, projected": coordinates(
                small([[2, "*-"]], **tp_pp, gpus_per_node=1, **wide(vwn_embedding="projected"))
            ),
            "TP2 PP2, tied baseline": coordinates(
                small([[2, "*-"]], **tp_pp, baseline=True, untie_embeddings_and_output_weights=False)
            ),
            "TP4 PP2, width": coordinates(
                small([[2, "*-"]], **tp_pp | {"gpus": (8,), "tensor_model_parallel_size": 4}, **by_width_4, **wide())
            ),
        },
        "saved": {"baseline": saved(small(baseline=True)), "(2, 8)": saved(small(**wide()))},
        "alive": {
            "blocks of 2": alive(small(**wide(vwn_recompute_block=2))),
            "blocks of 3, (2, 3)": alive(small(**wide(vwn_recompute_block=3, vwn_n=3))),
            "blocks of 2, TP2": alive(small(gpus=(2,), **tp, **wide(vwn_recompute_block=2))),
            "width partition": alive(small([[1, "*-*-"]], **by_width, **wide())),
            "blocks of 2, width partition": alive(small([[1, "*-*-"]], **by_width, **wide(vwn_recompute_block=2))),
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
        "flops": flops(),
        "flying": flying(),
        "messages": messages(),
        "verdicts": verdicts(),
        "built": built(),
        "found": found(),
        "recipes": recipes(),
        "ranking": ranking(),
    }
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()

"""Predicted time of a step and what ranks send each other. Everything here is arithmetic on stated rates.

FLOPs of matrix products per token (2 per multiply-add), forward; backward is twice that, recompute once more; the
residual's addition takes as long backward as forward:

    attention   2D(2q + 2k), and for causal scores and their product with values 2 * 2 q S/2  (arXiv 2205.05198)
    MLP         6DF gated, 4DF ungated; MoE: k times that of an expert, the shared expert's, and 2DE of the router
                (times the imbalance of expert-parallel ranks, as what they send each other)
    head        2DV for the next token and for each further prediction; fusion of a prediction 4D^2, or wide 4 n E^2
    connection  as predicted of the kernels (``planner.kernel_times``); with stream recompute the forward of all but one
                connection of a block again
    reduction   2 D' D; W_expand of a projected embedding the same; group norms of the ends read and write D'

Bytes that one rank sends in a ring of g ranks: (g-1)/g of the whole for an all-gather or a reduce-scatter, twice that
for an all-reduce; all-to-all (g-1)/g of what it holds.
"""

from collections import Counter
from dataclasses import dataclass

from megatron_vwn.ops.costs import PASSES, Pass, Width, end_flops, floor_seconds, fusion_flops
from megatron_vwn.planner.activations import mlp_bytes
from megatron_vwn.planner.hardware import Rates
from megatron_vwn.planner.kernel_times import connection_seconds
from megatron_vwn.planner.memory import message_bytes
from megatron_vwn.planner.shape import Parameters, Shape, counts


@dataclass(frozen=True)
class Step:
    """A predicted step.

    Attributes:
        seconds: of the whole step.
        parts: of ``seconds``: what the slowest pipeline rank does, the bubble, and so on; they add up.
        sent: bytes per step that the busiest rank sends, by group.
        tokens_per_second: of the whole run.
    """

    seconds: float
    parts: dict[str, float]
    sent: dict[str, float]
    tokens_per_second: float


def step_time(shape: Shape, held: list[Parameters], rates: Rates) -> Step:
    """Predict a step.

    Args:
        shape: the run.
        held: parameters of a rank of every pipeline stage.
        rates: what is assumed of the GPUs.
    """
    parts = step_parts(shape, held, rates)
    seconds = sum(parts.values())
    sent = (sent_bytes(shape, held[rank], rank) for rank in shape.unlike_stages())
    busiest = max(sent, key=lambda sums: sum(sums.values()))
    return Step(seconds, parts, busiest, shape.batch * shape.sequence / seconds)


def step_parts(shape: Shape, held: list[Parameters], rates: Rates) -> dict[str, float]:
    """Seconds of a step by what takes them, as ``step_time`` adds them up."""
    work = [micro_batch_seconds(shape, rank, rates) for rank in shape.unlike_stages()]
    worst = max(work, key=lambda seconds: sum(seconds.values()))
    parts = {name: seconds * shape.micro_batches for name, seconds in worst.items()}
    one = sum(worst.values())
    messages = pipeline_bytes(shape) / rates.link(_within_node(shape, "PP"))
    if shape.virtual == 1:
        parts["pipeline messages"] = shape.micro_batches * messages
    else:  # they overlap with another stage's passes
        parts["pipeline messages"] = shape.micro_batches * max(0.0, messages - one)
    parts["bubble"] = (shape.pipeline - 1) / shape.virtual * (one + messages / shape.virtual)
    parts["gradients and weights"] = max(_data_seconds(shape, each, one, rates) for each in held)
    parts["optimizer"] = max(_optimizer_bytes(shape, each) for each in held) / rates.memory
    return parts


def micro_batch_seconds(shape: Shape, rank: int, rates: Rates) -> dict[str, float]:
    """Both passes of one micro-batch through all virtual stages of a pipeline rank, by what takes the time."""
    seconds = Counter()
    for sublayers, further in rows(shape, rank):
        for symbol, count in counts(sublayers):
            for name, value in _forward_seconds(shape, symbol, rates).items():
                seconds[name] += count * (3 * value - _residual_seconds(shape, rates))
        seconds["recompute"] += _recompute_seconds(shape, sublayers, further, rates)
        if shape.width:
            seconds["connections"] += _connection_seconds(shape, len(sublayers), rates)
    for name, flops in edge_flops(shape, rank).items():
        seconds[name] += 3 * flops / rates.matrix
    for name, count in edge_norms(shape, rank).items():  # in and out, and backward two in and one out
        seconds[name] += count * 2 * shape.own_tokens * shape.stream_channels * (2 + 3) / rates.memory
    for group, count in micro_batch_bytes(shape, rank).items():
        if group != "CP":  # overlaps with the attention of the block before
            seconds[f"{group} communication"] += count / rates.link(_within_node(shape, group))
    if shape.overlaps_shared:
        seconds["EP communication"] -= _hidden_seconds(shape, rank, rates)
    return dict(seconds)


def rows(shape: Shape, rank: int) -> list[tuple[str, bool]]:
    """Sublayers that follow each other on a pipeline rank, and whether they are a further prediction's."""
    trunk = [(chunk, False) for chunk in shape.chunks(rank)]
    return trunk + [(further, True) for further in shape.predictions] * (rank == shape.pipeline - 1)


def sublayer_flops(shape: Shape, symbol: str) -> dict[str, float]:
    """Forward FLOPs of a micro-batch on one rank: products, attention's core, experts."""
    tokens, hidden = shape.tokens / shape.tensor, shape.hidden
    if symbol == "*":
        q, k = shape.heads * shape.head_channels, shape.groups * shape.head_channels
        return {"matrix": tokens * 4 * hidden * (q + k), "attention": tokens * 2 * q * shape.sequence}
    if symbol == "-":
        return {"matrix": tokens * _mlp_flops(shape, shape.ffn)}
    return {
        "matrix": tokens * (_mlp_flops(shape, shape.shared_ffn) + 2 * hidden * shape.experts),
        "expert": tokens * _mlp_flops(shape, shape.expert_ffn) * shape.top_k,
    }


def _mlp_flops(shape: Shape, ffn: int) -> int:
    """Of one token."""
    return (6 if shape.gated else 4) * shape.hidden * ffn


def edge_flops(shape: Shape, rank: int) -> dict[str, float]:
    """Forward FLOPs of a micro-batch for what is at the ends of the model."""
    tokens, hidden, wide = shape.tokens / shape.tensor, shape.hidden, shape.width is not None
    reduction = tokens * end_flops(shape.width) if wide else 0
    expansion = reduction if wide and shape.virtual_width.embedding == "projected" else 0
    fusion = tokens * (fusion_flops(shape.width) if wide else 4 * hidden**2)
    last, depths = rank == shape.pipeline - 1, len(shape.predictions)
    return {
        "head": last * (1 + depths) * tokens * 2 * hidden * shape.vocabulary,
        "reduction and expansion": (rank == 0) * expansion + last * (reduction + depths * (reduction + expansion)),
        "fusion": last * depths * fusion,
    }


def edge_norms(shape: Shape, rank: int) -> dict[str, int]:
    """Norms of the whole stream at the end of the model: before each W_reduce, and two in each fusion."""
    last, depths = rank == shape.pipeline - 1, len(shape.predictions)
    reductions = 1 + depths if shape.width is not None and shape.virtual_width.reduce_norm else 0
    return {"reduction and expansion": last * reductions, "fusion": last * 2 * depths}


def _forward_seconds(shape: Shape, symbol: str, rates: Rates) -> Counter:
    names = {"*": "attention", "-": "MLP", "E": "experts"}
    seconds = Counter()
    for unit, flops in sublayer_flops(shape, symbol).items():
        spread = shape.imbalance if unit == "expert" else 1
        seconds[names[symbol]] += spread * flops / getattr(rates, unit)
    # The norm reads and writes D, and what experts get is gathered and added up again.
    copies = 4 * shape.top_k if symbol == "E" else 0
    seconds[names[symbol]] += 2 * shape.own_tokens * shape.hidden * (2 + copies) / rates.memory
    seconds[names[symbol]] += _residual_seconds(shape, rates)
    return seconds


def _residual_seconds(shape: Shape, rates: Rates) -> float:
    """One pass of the ordinary residual, which reads two terms and writes their sum; its gradients are added likewise.
    The connections do its work where there are any."""
    return 0 if shape.width else 2 * shape.own_tokens * shape.hidden * 3 / rates.memory


def _again(shape: Shape, sublayers: str, further: bool) -> str:
    """Those of a row of sublayers whose forward pass Megatron's recompute runs twice."""
    if shape.granularity == "full" and shape.method == "uniform":
        return sublayers
    if shape.granularity == "full":  # which leaves further predictions alone
        return "" if further else sublayers[: shape.recompute_layers]
    if shape.granularity == "selective":
        chosen = {"-": "mlp", "E": "moe"}
        return "".join(symbol for symbol in sublayers if chosen.get(symbol) in shape.modules)
    return ""


def _recompute_seconds(shape: Shape, sublayers: str, further: bool, rates: Rates) -> float:
    """Megatron's recompute of the backbone: of whole sublayers, and of parts of those that are not repeated whole."""
    seconds = _repeat(shape, _again(shape, sublayers, further), rates)
    if shape.granularity != "selective":
        return seconds
    if "core_attn" in shape.modules:
        seconds += sublayers.count("*") * sublayer_flops(shape, "*")["attention"] / rates.attention
    if "moe" in shape.modules:
        return seconds
    each = 0.0
    if "shared_experts" in shape.modules:
        each += _shared_seconds(shape, rates)
    if "moe_act" in shape.modules:
        copies = shape.imbalance * shape.top_k * shape.own_tokens
        each += copies * mlp_bytes(shape, shape.expert_ffn) / rates.memory
    if "layernorm" in shape.modules:  # reads and writes D
        each += 2 * 2 * shape.own_tokens * shape.hidden / rates.memory
    return seconds + sublayers.count("E") * each


def _shared_seconds(shape: Shape, rates: Rates) -> float:
    """Forward pass of a shared expert."""
    return shape.tokens / shape.tensor * _mlp_flops(shape, shape.shared_ffn) / rates.matrix


def _hidden_seconds(shape: Shape, rank: int, rates: Rates) -> float:
    """What experts send while the shared expert computes: there beside its first products, and back beside its last."""
    link, shared = rates.link(_within_node(shape, "EP")), _shared_seconds(shape, rates)
    one_way = sublayer_bytes_sent(shape, "E", passes=(1, 0))["EP"] / link / 2
    first = shared * (2 / 3 if shape.gated else 1 / 2)
    forward, backward = (min(one_way, each * first) + min(one_way, each * (shared - first)) for each in (1, 2))
    hidden = 0.0
    for sublayers, further in rows(shape, rank):
        hidden += (sublayers + _again(shape, sublayers, further)).count("E") * forward + sublayers.count("E") * backward
    return hidden


def _repeat(shape: Shape, sublayers: str, rates: Rates) -> float:
    return sum(count * sum(_forward_seconds(shape, symbol, rates).values()) for symbol, count in counts(sublayers))


def _connection_seconds(shape: Shape, connections: int, rates: Rates) -> float:
    """Fused write and read of every boundary, in both passes, and what recompute repeats of it."""
    tokens = shape.own_tokens / (shape.tensor if shape.partition == "width" else 1)
    forward, backward = (_boundary_seconds(shape.width, direction, tokens, rates) for direction in PASSES)
    again = 0.0
    if shape.granularity == "full":
        again = connections if shape.method == "uniform" else min(connections, shape.recompute_layers)
    elif shape.block:
        again = connections - -(-connections // shape.block)
    return connections * (forward + backward) + again * forward


def _boundary_seconds(width: Width, direction: Pass, tokens: float, rates: Rates) -> float:
    if rates.connections is None:
        how = {"bandwidth": rates.memory, "flop_rate": rates.matrix}
        return tokens * floor_seconds("write_read", direction, width, 1, **how)
    return connection_seconds(rates.connections, direction, width, tokens, bandwidth=1e9 * rates.memory_gbs)


def sent_bytes(shape: Shape, held: Parameters, rank: int) -> dict[str, float]:
    """Bytes per step that one rank of a pipeline stage sends, by group."""
    sent = Counter({group: shape.micro_batches * count for group, count in micro_batch_bytes(shape, rank).items()})
    sent["PP"] = shape.micro_batches * pipeline_bytes(shape)
    # Sums of gradients of what every tensor-parallel rank holds whole, but for other tokens.
    sent["TP"] += 2 * _ring(shape.tensor) * shape.gradient_bytes * held.summed
    sent["DP"] = data_bytes(shape, held.dense, shape.data * shape.context)
    sent["DP of experts"] = data_bytes(shape, held.experts, shape.expert_data)
    return {group: count for group, count in sent.items() if count}


def data_bytes(shape: Shape, parameters: int, copies: int) -> float:
    """Sums of gradients are scattered and bf16 weights gathered; without a distributed optimizer an all-reduce."""
    if shape.shards_optimizer:
        return _ring(copies) * parameters * (shape.gradient_bytes + 2)
    return 2 * _ring(copies) * parameters * shape.gradient_bytes


def pipeline_bytes(shape: Shape) -> float:
    """One micro-batch: a state forward and a gradient back for each virtual stage."""
    return 0 if shape.pipeline == 1 else 2 * shape.virtual * message_bytes(shape)


def sublayer_bytes_sent(shape: Shape, symbol: str, *, passes: tuple[int, int] = (1, 1)) -> Counter:
    """One micro-batch of one sublayer, by group.

    TP with sequence parallelism: forward gathers the input and scatters the output's sum, backward gathers the output's
    gradient, scatters the input's, and gathers the input again for that of the weights: 5 times 2D bytes of all
    tokens. Without: an all-reduce each way. EP: k copies of each own token there and back, each way, and weights in
    fp32. CP: keys and values to all others, in the backward pass again and their gradients. The width partition: sums
    of coefficients and whole backbone vectors.

    Args:
        shape: the run.
        symbol: the sublayer.
        passes: how often the forward and the backward pass run.
    """
    forward, backward = passes
    whole = 2 * shape.tokens * shape.hidden
    sent = Counter()
    if symbol in "*-" or shape.shared_ffn:
        # Of an overlapped shared expert the gathered input is kept.
        again = shape.sequence_parallel and not (symbol == "E" and shape.overlaps_shared)
        times = 2 * forward + (3 if again else 2) * backward
        sent["TP"] += times * _ring(shape.tensor) * whole
    if symbol == "E":
        copies = shape.imbalance * shape.own_tokens * shape.top_k
        sent["EP"] += (forward + backward) * _ring(shape.expert) * copies * (2 * 2 * shape.hidden + 4)
    if symbol == "*" and shape.context > 1:
        both = 2 * 2 * shape.tokens * max(1, shape.groups / shape.tensor) * shape.head_channels
        sent["CP"] += (forward + 2 * backward) * (shape.context - 1) * both
    if shape.partition == "width" and shape.width:
        width = shape.width
        sums = 4 * width.n * (1 + 2 * width.num_coefficients) if width.dynamic else 4 * width.n * width.num_coefficients
        sent["TP"] += backward * shape.tokens * 2 * _ring(shape.tensor) * sums
        sent["TP"] += (forward + backward) * _ring(shape.tensor) * whole
    return sent


def micro_batch_bytes(shape: Shape, rank: int) -> dict[str, float]:
    """What a rank of a pipeline stage sends for one micro-batch, forward and backward, by group; PP is not in it."""
    sent = Counter()
    for sublayers, further in rows(shape, rank):
        for row, passes in ((sublayers, (1, 1)), (_again(shape, sublayers, further), (1, 0))):
            for symbol, count in counts(row):
                for group, value in sublayer_bytes_sent(shape, symbol, passes=passes).items():
                    sent[group] += count * value
        if shape.granularity == "selective" and "shared_experts" in shape.modules and "moe" not in shape.modules:
            sent["TP"] += sublayers.count("E") * sublayer_bytes_sent(shape, "E", passes=(1, 0))["TP"]
    ring, tokens = _ring(shape.tensor), 2 * shape.tokens
    depths = len(shape.predictions) if rank == shape.pipeline - 1 else 0
    table = shape.over_width if shape.width and shape.virtual_width.embedding == "wide" else shape.hidden
    # A look-up sums partial rows; a head gathers its input, twice under sequence parallelism, and sums its gradient.
    sent["TP"] += ring * tokens * table * 2 * ((rank == 0) + depths)
    if shape.width is None:  # the ordinary fusion is divided by columns: [embedding, state] in, its output gathered
        sent["TP"] += ring * depths * tokens * shape.hidden * (8 if shape.sequence_parallel else 5)
    elif shape.partition == "width":
        sent["TP"] += _edges_of_width_partition(shape, rank, depths)
    heads = (1 + depths) * (rank == shape.pipeline - 1)
    sent["TP"] += ring * heads * (tokens * shape.hidden * (3 if shape.sequence_parallel else 2) + 3 * 2 * 2 * tokens)
    return {group: count for group, count in sent.items() if count}


def _edges_of_width_partition(shape: Shape, rank: int, depths: int) -> float:
    """The stream's ends where each rank has some channels: of each embedding, reduction and fusion, with group norms.

    Embedding: cut to the rank's channels, so gathered backward; W_expand's input gets a sum of gradients. Reduction:
    the mean of copies gathered in fp32, and the sum of products. Fusion: the sum of products, cut again.
    """
    kind, last = shape.virtual_width.embedding, rank == shape.pipeline - 1
    hidden, wide, groups = 2 * shape.hidden, 2 * shape.over_width, -(-shape.over_width // shape.hidden)
    look_up = {"wide": wide, "tiled": hidden, "projected": 3 * hidden}[kind]
    norm = 2 * 2 * 4 * groups
    reduction = 2 * hidden + 2 * hidden + (norm if shape.virtual_width.reduce_norm else 0)
    fusion = 2 * wide + wide + 2 * norm
    per_token = ((rank == 0) + depths) * look_up + (last + depths) * reduction + depths * fusion
    return _ring(shape.tensor) * shape.tokens * per_token


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _within_node(shape: Shape, group: str) -> bool:
    """Ranks are numbered along TP, CP, then DP (experts: EP, then DP), and the pipeline last."""
    inner = shape.gpus // shape.pipeline
    reach = {
        "TP": shape.tensor,
        "CP": shape.tensor * shape.context,
        "EP": shape.expert,
        "DP": inner,
        "PP": shape.gpus,
    }
    return reach[group] <= shape.gpus_per_node


def _data_seconds(shape: Shape, held: Parameters, micro_batch: float, rates: Rates) -> float:
    """What of the data-parallel communication does not hide behind the last micro-batch's passes."""
    sent = data_bytes(shape, held.dense, shape.data * shape.context) + data_bytes(
        shape, held.experts, shape.expert_data
    )
    seconds = sent / rates.link(_within_node(shape, "DP"))
    return max(0.0, seconds - rates.data_overlap * micro_batch) if shape.overlaps_gradients else seconds


def _optimizer_bytes(shape: Shape, held: Parameters) -> float:
    """Adam reads and writes its states, reads gradients and writes weights; clipping reads gradients once more."""
    shards = shape.data * shape.context if shape.shards_optimizer else 1
    expert_shards = shape.expert_data if shape.shards_optimizer else 1
    own = held.dense / shards + held.experts / expert_shards
    return own * (2 * shape.optimizer_bytes + 2 * shape.gradient_bytes + 2)

"""Memory of one rank by kind, in bytes: parameters and their states, activations, the over-width stream, buffers."""

import math
from dataclasses import dataclass, fields, replace

from megatron_vwn.planner.activations import (
    connection_bytes,
    edge_bytes,
    rebuilding_bytes,
    sublayer_bytes,
)
from megatron_vwn.planner.shape import Parameters, Shape, counts


@dataclass(frozen=True)
class Memory:
    """Of the fullest moment of a step.

    Attributes:
        weights: bf16.
        gradients: the buffer that micro-batches add to.
        optimizer: master weights and moments, this rank's shard of them.
        activations: of the backbone, all micro-batches in flight; what recompute makes once is in it.
        stream: kept because of the virtual width: states, outputs of sublayers, what stream recompute rebuilds.
        head: inputs, logits and losses of all heads.
        buffers: of messages between pipeline stages.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    stream: float
    head: float
    buffers: float

    @property
    def total(self) -> float:
        """Of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(shape: Shape, held: Parameters, rank: int, backend: str = "fused") -> Memory:
    """What a rank of a pipeline stage needs.

    Args:
        shape: the run.
        held: the rank's parameters.
        rank: the pipeline stage, counted from zero.
        backend: see ``_plan_activations``.
    """
    activations = stream = head = 0.0
    for number, (chunk, flying) in enumerate(zip(shape.chunks(rank), in_flight(shape, rank), strict=True)):
        first = rank == 0 and number == 0
        last = rank == shape.pipeline - 1 and number == shape.virtual - 1
        edges = edge_bytes(shape, backend, first=first, last=last)
        head += flying * edges.pop("head")
        activations += flying * sum(edges.values())
        rows = [(chunk, False), *((further, True) for further in shape.predictions if last)]
        for sublayers, further in rows:
            kept, wide = kept_bytes(shape, sublayers, backend, further=further)
            activations, stream = activations + flying * kept, stream + flying * wide
    # Of all that is made again in a backward pass there is one at a time.
    again = [once_bytes(shape, part, backend) for chunk in shape.chunks(rank) for part in (chunk, *shape.predictions)]
    if rank == shape.pipeline - 1:
        head += shape.tokens * 2 * shape.vocabulary / shape.tensor  # gradient of the logits of one head
    shards = shape.data * shape.context if shape.shards_optimizer else 1
    expert_shards = shape.expert_data if shape.shards_optimizer else 1
    return Memory(
        weights=2 * held.total,
        gradients=shape.gradient_bytes * held.total,
        optimizer=shape.optimizer_bytes * (held.dense / shards + held.experts / expert_shards),
        activations=activations + max(kept for kept, _ in again),
        stream=stream + max(wide for _, wide in again),
        head=head,
        buffers=_buffers(shape),
    )


def kept_bytes(shape: Shape, sublayers: str, backend: str = "fused", *, further: bool = False) -> tuple[float, float]:
    """Kept by a row of sublayers for one micro-batch: of the backbone, and of the stream.

    Full recompute keeps the state before every chunk of N sublayers (method uniform) or of each of the first N (block).
    Of a layer that predicts further tokens method uniform keeps its two inputs, and block everything.
    """
    checkpoints, whole = _chunks(shape, sublayers)
    if further and shape.granularity == "full":
        checkpoints, whole = (2, "") if shape.method == "uniform" else (0, sublayers)
    state = message_bytes(shape)
    backbone = _sum(shape, whole, backend)
    wide = connection_bytes(shape, backend, len(whole))
    if shape.width is None:
        return backbone + checkpoints * state, wide
    return backbone, wide + checkpoints * state


def once_bytes(shape: Shape, sublayers: str, backend: str = "fused") -> tuple[float, float]:
    """What a backward pass makes again at once: of the backbone, and of the stream."""
    if shape.granularity == "selective":
        stripped = replace(shape, granularity="")
        extra = [sublayer_bytes(s, stripped, backend) - sublayer_bytes(s, shape, backend) for s in set(sublayers)]
        return max(extra, default=0), rebuilding_bytes(shape, len(sublayers))
    if shape.granularity != "full":
        return 0, rebuilding_bytes(shape, len(sublayers))
    size = shape.recompute_layers if shape.method == "uniform" else 1
    chunks = [sublayers[begin : begin + size] for begin in range(0, len(sublayers), size)]
    backbone = max((_sum(shape, chunk, backend) for chunk in set(chunks)), default=0)
    longest = max(map(len, chunks), default=0)
    return backbone, connection_bytes(shape, backend, longest) + rebuilding_bytes(shape, longest)


def in_flight(shape: Shape, rank: int) -> list[int]:
    """Micro-batches whose activations each virtual stage of a rank holds when its first backward pass begins.

    One without a pipeline; PP - rank in 1F1B; with V interleaved stages the warm-up of Megatron's schedule, that is
    2 (PP - rank - 1) + (V - 1) PP + 1 passes, which go through the stages PP micro-batches at a time.
    """
    micro_batches, ranks, virtual = shape.micro_batches, shape.pipeline, shape.virtual
    if ranks == 1:
        return [1] * virtual
    if virtual == 1:
        return [min(micro_batches, ranks - rank)]
    passes = min(micro_batches * virtual, 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1)
    flying = [0] * virtual
    for number in range(passes):
        flying[number // ranks % virtual] += 1
    return flying


def _sum(shape: Shape, sublayers: str, backend: str) -> float:
    return sum(count * sublayer_bytes(symbol, shape, backend) for symbol, count in counts(sublayers))


def _chunks(shape: Shape, sublayers: str) -> tuple[int, str]:
    """How many states full recompute keeps, and the sublayers that are kept whole."""
    if shape.granularity != "full":
        return 0, sublayers
    if shape.method == "uniform":
        return math.ceil(len(sublayers) / shape.recompute_layers), ""
    count = min(shape.recompute_layers, len(sublayers))
    return count, sublayers[count:]


def _buffers(shape: Shape) -> float:
    """A gradient that arrives and one that leaves; twice as many where messages overlap with computation."""
    if shape.pipeline == 1:
        return 0
    return message_bytes(shape) * (2 if shape.virtual == 1 else 4)


def message_bytes(shape: Shape) -> float:
    """One state between pipeline stages, of one micro-batch and one rank."""
    return 2 * shape.own_tokens * shape.stream_channels

"""FLOPs and memory that a virtual width adds, for the patched training loop of a Megatron-LM source checkout.

Megatron counts FLOPs and estimates memory from its arguments alone; ``patches/`` puts the decorators below on those
functions. Without ``--vwn-*`` flags they return what Megatron computes. What a connection multiplies and keeps is
``ops.costs``; the counts of parameters are those of ``modules/``, to the last one.

Megatron imports this module while it imports its training loop, so nothing here may import ``megatron.training``.
"""

import argparse
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_layer_counts, parse_hybrid_pattern

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.ops.costs import Width, end_flops, fusion_flops, kept_stream_bytes, matrix_flops, once_stream_bytes
from megatron_vwn.training.flags.vwn import virtual_width_from_args

Args = argparse.Namespace
# Each GEMM runs forward, for the gradient of its input and for that of its weight; as Megatron counts its own.
_FORWARD_AND_BACKWARD = 3
_MEGABYTE = 1 << 20
# One mixer and one MLP, in turn: what a layer of Megatron's Transformer is.
_PAIRS = re.compile(r"(?:\*[-E])+|(?:\+[-E])+")


@dataclass(frozen=True)
class AddedParameters:
    """Parameters on the most loaded rank.

    Attributes:
        tp_sharded: of those that tensor-parallel ranks share, this rank's.
        replicated: of those that each of them has whole.
    """

    tp_sharded: float
    replicated: float

    @property
    def total(self) -> float:
        """Both."""
        return self.tp_sharded + self.replicated


def counts_virtual_width_flops(num_floating_point_operations: Callable) -> Callable:
    """Decorate Megatron's function of this name: what it returns, plus ``added_flops`` of the same tokens."""

    @wraps(num_floating_point_operations)
    def count(args: Args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None):
        baseline = num_floating_point_operations(
            args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch
        )
        tokens = total_real_tokens_in_batch
        if tokens is None:
            tokens = batch_size * args.seq_length
        return baseline + tokens * added_flops(args)

    return count


def counts_virtual_width_weights(compute_weight_and_optimizer_memory: Callable) -> Callable:
    """Decorate Megatron's function of this name: the bytes of the baseline's layers, plus those of the virtual width's
    weights, gradients and optimizer."""

    @wraps(compute_weight_and_optimizer_memory)
    def count(args: Args, verbose: bool = False):
        if virtual_width_from_args(args) is None:
            return compute_weight_and_optimizer_memory(args, verbose=verbose)
        baseline = compute_weight_and_optimizer_memory(as_transformer(args), verbose=verbose)
        return baseline + _said(added_weight_bytes(args), "weights and optimizer", verbose)

    return count


def counts_virtual_width_activations(compute_activation_memory: Callable) -> Callable:
    """Decorate either of Megatron's two functions of activation memory: the bytes of the baseline's layers, plus those
    that the stream keeps for the backward pass."""

    @wraps(compute_activation_memory)
    def count(args: Args, num_microbatches: int | None = None, verbose: bool = False):
        if virtual_width_from_args(args) is None:
            return compute_activation_memory(args, num_microbatches=num_microbatches, verbose=verbose)
        baseline = compute_activation_memory(as_transformer(args), num_microbatches=num_microbatches, verbose=verbose)
        return baseline + _said(added_activation_bytes(args, num_microbatches), "activations", verbose)

    return count


def is_countable(args: Args) -> bool:
    """Whether the memory of a HybridModel can be estimated: it has a virtual width, and Megatron, which estimates
    Transformers only, has one of the same layers.

    Attention and MLP or experts must take turns, each further prediction being one such pair, of the last layer's kind.
    """
    if virtual_width_from_args(args) is None:
        return False
    main, further = _pattern(args)
    return bool(_PAIRS.fullmatch(main)) and further in ("", main[-2:])


def as_transformer(args: Args) -> Args:
    """The arguments of the Transformer that has the layers of a HybridModel; see ``is_countable``."""
    main, _ = _pattern(args)
    twin = copy.copy(args)  # Megatron's estimate writes into its arguments
    twin.num_layers = len(main) // 2
    twin.moe_layer_freq = [int(symbol == "E") for symbol in main[1::2]]
    return twin


def added_flops(args: Args) -> int:
    """FLOPs of matrix products that the virtual width adds per token, forward and backward, without recomputation.

    Connections by ``ops.costs``; W_expand and W_reduce, 2DD' each; of each further prediction its reduction, its
    W_expand and its fusion, 4nE^2. (Megatron does not count the fusion of the ordinary model.)
    """
    virtual_width = virtual_width_from_args(args)
    if virtual_width is None:
        return 0
    width, depths = Width.of(virtual_width, args.hidden_size), _depths(args)
    ends = 2 if virtual_width.embedding == "projected" else 1
    forward = sum(get_hybrid_layer_counts(args.hybrid_layer_pattern).values()) * matrix_flops(
        "connection", "forward", width
    )
    forward += (1 + depths) * ends * end_flops(width) + depths * fusion_flops(width)
    return _FORWARD_AND_BACKWARD * forward


def added_parameters(args: Args) -> AddedParameters:
    """Parameters that the virtual width adds to the rank which Megatron estimates, that of the most.

    It has a first stage's share of the connections, the embedding and, as in Megatron's estimate, all further
    predictions; on one stage also the reduction. Of an ordinary model's further predictions the fusion is not
    subtracted, because Megatron's estimate does not count it.
    """
    virtual_width = virtual_width_from_args(args)
    width, stages = Width.of(virtual_width, args.hidden_size), args.pipeline_model_parallel_size
    over, hidden, segment = width.over_width, width.hidden_size, width.segment
    norm = over * (1 if args.normalization == "RMSNorm" else 2)
    projected = over * hidden if virtual_width.embedding == "projected" else 0
    main, further = _pattern(args)
    depths = min(_depths(args), 1) if args.mtp_use_repeated_layer else _depths(args)
    connections = len(main) / stages + depths * len(further)
    reductions = depths + (stages == 1)

    rows, positions = 0, 0
    if virtual_width.embedding == "wide":
        rows = args.padded_vocab_size * (over - hidden)
        if args.position_embedding_type == "learned_absolute":
            positions = args.max_position_embeddings * (over - hidden)
    rows += len(virtual_width.ngrams) * (virtual_width.ngram_vocab or 0) * over
    by_channel = projected * (1 + depths) + reductions * hidden * over + depths * 2 * segment**2
    coefficients = connections * width.n * width.num_coefficients
    if width.dynamic:
        by_channel += connections * segment * (width.num_coefficients + 1)
        coefficients *= 2
    whole = coefficients + positions + norm * (reductions * virtual_width.reduce_norm + 2 * depths)
    ranks = args.tensor_model_parallel_size
    if _partition(args, virtual_width) == "width":
        return AddedParameters(tp_sharded=(rows + by_channel) / ranks, replicated=whole)
    return AddedParameters(tp_sharded=rows / ranks, replicated=whole + by_channel)


def added_weight_bytes(args: Args) -> float:
    """Bytes of ``added_parameters`` with gradients and optimizer, per parameter as many as Megatron estimates."""
    each = 6 + 12 / args.data_parallel_size if args.use_distributed_optimizer else 18
    return added_parameters(args).total * each


def added_activation_bytes(args: Args, num_microbatches: int | None = None) -> float:
    """Bytes of the stream that a rank of the first stage keeps, ``ops.costs.kept_stream_bytes`` of each micro-batch in
    flight.

    As Megatron's own estimate this knows ``--vwn-recompute-block`` but not ``--recompute-granularity full``.

    Args:
        args: Megatron's validated arguments.
        num_microbatches: of a step; None for enough to fill the pipeline.
    """
    virtual_width = virtual_width_from_args(args)
    width, stages = Width.of(virtual_width, args.hidden_size), args.pipeline_model_parallel_size
    main, further = _pattern(args)
    connections = len(main) // stages + (_depths(args) * len(further) if stages == 1 else 0)
    block = virtual_width.recompute_block
    element_bytes = 4 if args.fp32_residual_connection else args.params_dtype.itemsize
    per_token = kept_stream_bytes(width, connections, block=block, element_bytes=element_bytes)
    once = 0 if block is None else once_stream_bytes(width, block, element_bytes=element_bytes)
    per_token = (per_token - once) * _in_flight(args, num_microbatches) + once
    tokens = args.seq_length * args.micro_batch_size / args.context_parallel_size
    ranks = 1 if _partition(args, virtual_width) == "replicated" else args.tensor_model_parallel_size
    return per_token * tokens / ranks


def _in_flight(args: Args, num_microbatches: int | None) -> float:
    """Micro-batches whose activations the first stage keeps, in units of all its layers, as Megatron estimates it."""
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    if chunks is not None:
        return stages + (stages - 1) / chunks
    return stages if num_microbatches is None else min(num_microbatches, stages)


def _said(added: float, of_what: str, verbose: bool) -> float:
    if verbose:
        print(f"Virtual width, in {of_what}: {added / _MEGABYTE:.2f} MB")
    return added


def _partition(args: Args, virtual_width: VirtualWidthConfig) -> str:
    return virtual_width.resolve_partition(
        tensor_parallel_size=args.tensor_model_parallel_size, sequence_parallel=args.sequence_parallel
    )


def _pattern(args: Args) -> tuple[str, str]:
    """The symbols of the trunk without marks of stages, and those of one further prediction."""
    pattern = parse_hybrid_pattern(args.hybrid_layer_pattern)
    return pattern.main_pattern.replace("|", ""), pattern.mtp_pattern or ""


def _depths(args: Args) -> int:
    return parse_hybrid_pattern(args.hybrid_layer_pattern).mtp_num_depths

"""Whether a virtual width can be held at all, before an allocator says that it cannot."""

import argparse
import os

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.refusals.layers import pattern_of


def refuse_too_large(args: argparse.Namespace, virtual_width: VirtualWidthConfig, *, gpu: bool) -> None:
    """Refuse a stream whose own parameters alone are beyond the memory that a rank has.

    A lower bound of what is needed is compared, so that nothing is refused that could run: parameters and as many bytes
    of gradients, split over as many ranks as can share them. ``vwn-plan`` says what a run needs.

    Args:
        args: Megatron's arguments, parsed.
        virtual_width: the stream.
        gpu: whether a GPU is present (not an emulated one).

    Raises:
        VirtualWidthError: the parameters do not fit.
    """
    if args.hidden_size is None:
        return
    m, n = virtual_width.m, virtual_width.n
    coefficients = n * (2 * m + virtual_width.num_carry)
    sublayers = sum(symbol not in (Symbols.PIPE, Symbols.MTP_SEPARATOR) for symbol in pattern_of(args))
    tables = len(virtual_width.ngrams) * (virtual_width.ngram_vocab or 0) / args.tensor_model_parallel_size
    own = sublayers / args.pipeline_model_parallel_size * coefficients
    own += tables * virtual_width.over_width(args.hidden_size)
    needed = own * 2 * (2 if args.bf16 or args.fp16 else 4)
    available = _memory_of_a_rank(gpu=gpu)
    if needed > available:
        raise VirtualWidthError(
            f"--vwn-m {m} --vwn-n {n} needs at least {needed / 1e9:,.0f} GB on a rank for the parameters of its stream "
            f"alone, {coefficients:,} of them for the routing of every sublayer, and a rank has "
            f"{available / 1e9:,.0f} GB: lower --vwn-n{' or --vwn-ngram-vocab' if tables else ''}."
        )


def _memory_of_a_rank(*, gpu: bool) -> float:
    """Bytes: of its GPU, or its share of the machine's."""
    if gpu:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

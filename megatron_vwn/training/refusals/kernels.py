"""Which implementation ``--vwn-kernels`` means on this machine; said once, refused where it cannot be.

``ops`` decides, here as in every step; what is added here is what it is told of a run.
"""

import argparse
import os

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.ops import COST_OF_TORCH, why_not_group_norm_kernel, why_not_kernels


def refuse_kernels(args: argparse.Namespace, virtual_width: VirtualWidthConfig, *, gpu: bool) -> None:
    """Refuse ``--vwn-kernels triton`` where the kernels cannot compute.

    Args:
        args: Megatron's arguments.
        virtual_width: the stream.
        gpu: whether a GPU is present (not an emulated one).

    Raises:
        VirtualWidthError: the kernels were demanded and cannot compute this stream here.
    """
    reason = _why_not(args, virtual_width, gpu=gpu) if virtual_width.kernels == "triton" else None
    if reason is not None:
        raise VirtualWidthError(
            f"--vwn-kernels triton cannot compute this stream, because {reason}: choose --vwn-kernels auto or torch."
        )


def describe_kernels(args: argparse.Namespace, virtual_width: VirtualWidthConfig, *, gpu: bool) -> str:
    """What will read and write the stream, for the line about a run's stream; arguments as ``refuse_kernels``."""
    if virtual_width.kernels == "torch":
        return "torch operations"
    reason = _why_not(args, virtual_width, gpu=gpu)
    if reason is None:
        return f"fused Triton kernels{_tiles()}" if gpu else "fused Triton kernels in Triton's interpreter"
    return f"torch operations instead of Triton kernels ({reason})"


def _tiles() -> str:
    # Imports Triton, which a run without kernels does without.
    from megatron_vwn.ops.kernels.geometry import tuned, tuned_file

    try:
        number = len(tuned())
    except ValueError as error:
        raise VirtualWidthError(str(error)) from error
    return f" with {number} tiles measured on this machine ({tuned_file()})" if number else ""


def kernel_fallbacks(args: argparse.Namespace, virtual_width: VirtualWidthConfig, *, gpu: bool) -> list[str]:
    """Warnings about what torch computes although kernels are wanted and there is a GPU (or Triton's interpreter), with
    the cost; arguments as ``refuse_kernels``."""
    if virtual_width.kernels == "torch" or _no_device(virtual_width, gpu=gpu):
        return []
    warnings = []
    reason = _why_not(args, virtual_width, gpu=gpu)
    if reason is not None:
        warnings.append(f"{COST_OF_TORCH} ({reason})")
    has_norm = virtual_width.reduce_norm or "/" in (args.hybrid_layer_pattern or "")
    no_norm = why_not_group_norm_kernel(
        virtual_width.norm_group * virtual_width.segment_size(args.hidden_size),
        layer_norm=args.normalization == "LayerNorm",
        sums_over_ranks=_splits_width(args, virtual_width),
    )
    if has_norm and no_norm is not None and no_norm != reason:
        warnings.append(
            "torch operations compute the group norms before the reduction and of further predictions instead of a "
            f"Triton kernel, at several times its memory traffic and with fp32 copies of the stream ({no_norm})"
        )
    return warnings


def _why_not(args: argparse.Namespace, virtual_width: VirtualWidthConfig, *, gpu: bool) -> str | None:
    return _no_device(virtual_width, gpu=gpu) or why_not_kernels(
        virtual_width.n,
        doubly_stochastic=virtual_width.carry == "doubly-stochastic",
        eps=args.layernorm_epsilon,
        sums_over_ranks=_splits_width(args, virtual_width),
    )


def _no_device(virtual_width: VirtualWidthConfig, *, gpu: bool) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and virtual_width.kernels == "triton"
    return None if gpu or interpreted else "there is no GPU"


def _splits_width(args: argparse.Namespace, virtual_width: VirtualWidthConfig) -> bool:
    partition = virtual_width.resolve_partition(
        tensor_parallel_size=args.tensor_model_parallel_size, sequence_parallel=args.sequence_parallel
    )
    return partition == "width"

"""Which implementation ``--vwn-kernels`` means on this machine; said once, refused where it cannot be."""

import argparse
import os

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.ops import why_not_kernels


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


def _why_not(args: argparse.Namespace, virtual_width: VirtualWidthConfig, *, gpu: bool) -> str | None:
    partition = virtual_width.resolve_partition(
        tensor_parallel_size=args.tensor_model_parallel_size, sequence_parallel=args.sequence_parallel
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and virtual_width.kernels == "triton"
    if not gpu and not interpreted:
        return "there is no GPU"
    if partition == "width":
        return "the width partition sums over ranks between their steps"
    return why_not_kernels(virtual_width.n, doubly_stochastic=virtual_width.carry == "doubly-stochastic")

"""Launching a kernel: how many programs, and Triton's interpreter where there is no GPU."""

import torch
import triton
from torch import Tensor

from megatron_vwn.ops.kernels.geometry import Geometry

# Enough programs to keep a GPU's memory busy while each still owns its sums; without a GPU, enough to be several.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_PROGRAMS_WITHOUT_GPU = 3

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from megatron_vwn.ops.kernels.interpreter import repair

    repair()


def launch(kernel: triton.JITFunction, grid: int, geometry: Geometry, *arguments) -> None:
    """Run a kernel on a one-dimensional grid; a grid of no programs is no launch."""
    if grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[(grid,)](*arguments, G=geometry, num_warps=geometry.warps, num_stages=geometry.stages)


def tiles(h_TNE: Tensor, geometry: Geometry) -> int:
    """Tiles of all tokens: the programs of a forward kernel."""
    return triton.cdiv(h_TNE.shape[0], geometry.tokens)


def programs(h_TNE: Tensor, work: int) -> int:
    """Programs of a backward kernel, which take so many tiles, or tokens, in turn."""
    most = _PROGRAMS_WITHOUT_GPU
    if h_TNE.is_cuda:
        properties = torch.cuda.get_device_properties(h_TNE.device)
        most = _PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
    return min(work, most)

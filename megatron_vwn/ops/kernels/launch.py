"""Launching a kernel: its options, how many programs, and Triton's interpreter where there is no GPU."""

import torch
import triton
from torch import Tensor

from megatron_vwn.ops.kernels.geometry import Tile

# Enough programs to keep a GPU's memory busy while each still owns its sums; without a GPU, enough to be several.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_PROGRAMS_WITHOUT_GPU = 3

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from megatron_vwn.ops.kernels.interpreter import repair

    repair()


def launch(kernel: triton.JITFunction, grid: int | tuple[int, ...], tile: Tile, *arguments, **constants) -> None:
    """Run a kernel whose first argument is a tensor; a grid of no programs is no launch.

    Products and sums are fused into one rounding, which is stated because compilers differ in their default. Launches
    of the autograd engine come from threads that have not chosen a device, so the tensor's is chosen.
    """
    grid = (grid,) if isinstance(grid, int) else grid
    if 0 in grid:
        return
    options = {} if tile.maxnreg is None else {"maxnreg": tile.maxnreg}
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](
            *arguments, **constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True, **options
        )


def programs(h_TNE: Tensor, work: int) -> int:
    """Programs of a kernel that takes so many tokens in turn."""
    most = _PROGRAMS_WITHOUT_GPU
    if h_TNE.is_cuda:
        properties = torch.cuda.get_device_properties(h_TNE.device)
        most = _PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
    return min(work, most)

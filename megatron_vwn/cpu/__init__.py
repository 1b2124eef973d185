"""Run unmodified Megatron on a machine without a GPU: everything that Megatron calls "cuda" is the CPU, over gloo.

    import megatron_vwn.cpu

    megatron_vwn.cpu.install()  # before the first `import megatron`

Megatron says "cuda" in five ways, and each has one answer in one file:

    tensors.py            device="cuda", .cuda(), .type(), torch.Generator(device="cuda"), torch.autocast("cuda")
    runtime.py            torch.cuda.Stream, Event, synchronize, memory_allocated, nvtx, ...
    rng.py                torch.cuda.get_rng_state, manual_seed, ...
    gloo.py               what Megatron expects of NCCL and gloo does otherwise
    checkpoint_writer.py  a helper process that may not be forked once CUDA is initialised, and may be here

It is for tests and for trying a configuration on a laptop. What it cannot show: speed, memory (always 0), CUDA graphs,
Transformer Engine, fused kernels, and races between streams, because every stream has already finished. A tensor
"copied" to the emulated device is the tensor itself, as for one that is there already. ``tensor.is_cuda`` and
``tensor.device`` keep telling the truth. The emulated device belongs to the thread that called ``install()``: threads
started elsewhere see the machine as it is. Launch Megatron with ``--distributed-backend gloo``.
"""

import os
import sys

import torch

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.cpu import checkpoint_writer, gloo, rng, runtime, tensors

_active = False


def install(*, announce: bool = True) -> bool:
    """Make the CPU stand in for the GPU in this process, once; call it before the first ``import megatron``.

    Where a GPU is available nothing is changed, and there is no way to force it: hide the GPU with an empty
    ``CUDA_VISIBLE_DEVICES`` to try the emulation there. Rank 0 prints one line to stderr when the emulation starts.

    Args:
        announce: print that line; a program that trains nothing need not.

    Returns:
        True if the emulation is active, False where a GPU is available.

    Raises:
        VirtualWidthError: if Megatron was imported before, because it then holds the functions to be replaced.
    """
    global _active
    if _active:
        return True
    if torch.cuda.is_available():
        return False
    if any(name.startswith("megatron.") for name in sys.modules):
        raise VirtualWidthError(
            "megatron was imported before megatron_vwn.cpu.install() and already holds what the emulation replaces: "
            "call install() first."
        )
    _disable_compilation()
    # Megatron refuses tensor parallelism without it; it means nothing here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    runtime.install()
    rng.install()
    gloo.install()
    tensors.install()
    checkpoint_writer.install()  # imports Megatron, so it comes last
    _active = True
    if announce and os.environ.get("RANK", "0") == "0":
        print(
            "megatron_vwn.cpu: no GPU here, so Megatron runs on an emulated one (CPU, gloo).",
            file=sys.stderr,
            flush=True,
        )
    return True


def _disable_compilation() -> None:
    """Keep Megatron's ``@jit_fuser`` functions eager: torch.compile would need a C++ compiler and minutes of a test."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if "torch._dynamo" in sys.modules:  # it read the environment when it was imported
        torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"

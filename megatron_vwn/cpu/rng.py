"""The emulated GPU has one random number generator: the CPU's default one.

``torch.cuda.random`` then works as it is, and so does Megatron's RNG tracker, whose ``fork()`` swaps the state of the
CPU generator in and out. Host and device share a stream of random numbers that are separate on a GPU, so seeds give
other numbers than there; save, restore and recompute stay exact, because both states are always taken together. What
draws on the host between a restore and the next step has to leave that stream alone.
"""

import logging
from functools import wraps

import torch
from torch.utils.data import dataloader


def install() -> None:
    """Point ``torch.cuda.random`` and Megatron's tracker at the CPU generator; ``runtime.install()`` comes before."""
    torch.cuda.default_generators = (torch.default_generator,)
    for name in ("current_device", "device_count", "is_initialized"):  # it imported these by name
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    # The tracker warns when the CPU generator moves inside fork(), which is the point here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    dataloader._BaseDataLoaderIter.__init__ = _leaving_the_generator_alone(dataloader._BaseDataLoaderIter.__init__)


def _leaving_the_generator_alone(start_iterator):
    """Starting an iterator draws a seed for its workers, on a GPU machine from the host's generator only.

    A resumed run starts its iterators after it has restored the checkpoint's states, an uninterrupted one long before:
    drawn from the one generator here, the seed would give the two runs different dropout.
    """

    @wraps(start_iterator)
    def start(*args, **kwargs):
        state = torch.get_rng_state()
        start_iterator(*args, **kwargs)
        torch.set_rng_state(state)

    return start

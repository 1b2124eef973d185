"""Where Megatron over gloo needs something else than Megatron over NCCL.

Measured with torch 2.11: gloo reduces with AVG (also coalesced), scatters, gathers and sends in every dtype that
Megatron trains in, empty and aliased buffers included. What is left:

- The split sizes of ``all_to_all_single`` have to be integers, and Megatron converts its tensors of sizes only when
  they are on a GPU.
- ``all_gather`` wants equal sizes; Megatron's layer-wise optimizer gathers what each rank has of the parameters.
- Every group brings a network device, whose thread wakes a hundred times a second. Megatron makes dozens of groups,
  dozens more for each new layout, and never closes them: 60 idle groups cost 6 % of a core in every rank, 0.3 % when
  they share one device.
"""

import functools
import os

import torch
import torch.distributed as dist

from megatron_vwn.cpu.stand_in import constructed_by


def install() -> None:
    """Convert split sizes, gather unequal ones, and let all gloo groups of this process share one network device."""
    _accept_tensors_as_split_sizes()
    _gather_unequal_sizes()
    if dist.is_gloo_available():
        _share_network_device()


def _integers(sizes):
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def _accept_tensors_as_split_sizes() -> None:
    real = dist.all_to_all_single

    @functools.wraps(real)
    def all_to_all_single(*args, **kwargs):
        # The first two are the buffers, and no other tensor than sizes stands behind them.
        sizes = {name: _integers(value) if name.endswith("_sizes") else value for name, value in kwargs.items()}
        return real(*args[:2], *map(_integers, args[2:]), **sizes)

    dist.all_to_all_single = all_to_all_single


def _gather_unequal_sizes() -> None:
    real = dist.all_gather

    @functools.wraps(real)
    def all_gather(*args, **kwargs):
        given = dict(zip(("tensor_list", "tensor", "group"), args, strict=False)) | kwargs
        received, group = given["tensor_list"], given.get("group")
        if len({each.numel() for each in received}) == 1:
            return real(*args, **kwargs)
        received[dist.get_rank(group)].copy_(given["tensor"])
        for i, each in enumerate(received):
            dist.broadcast(each, group=group, group_src=i)
        return None  # no work is left to wait for, asynchronous or not

    dist.all_gather = all_gather


def _share_network_device() -> None:
    real = dist.ProcessGroupGloo

    @functools.cache
    def devices():
        """What gloo would make for each group: one device per interface named in the environment, or the default."""
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
        if interfaces:
            return [real.create_device(interface=interface) for interface in interfaces.split(",")]
        return [real.create_default_device()]

    def make(*args, **kwargs):
        if len(args) != 3 or not kwargs.get("timeout") or any(kwargs[name] for name in kwargs.keys() - {"timeout"}):
            # Not how torch.distributed makes its groups, or with what only the real constructor knows how to do.
            return real(*args, **kwargs)
        shared = real._Options()
        shared._devices, shared._timeout = devices(), kwargs["timeout"]
        return real(*args, shared)

    dist.ProcessGroupGloo = dist.distributed_c10d.ProcessGroupGloo = constructed_by(real, make)

"""Repairs of how megatron-core 0.19 saves and loads its distributed optimizer for another layout.

Both faults are Megatron's own, with and without a virtual width, and whatever optimizer is installed. The first is
silent: training is right, the file is not.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_vwn.megatron_fixes.repair import repair


def save_states_where_parameters_lie() -> None:
    """Let ``--dist-ckpt-optim-fully-reshardable`` save each parameter's own state where buckets are padded.

    Megatron gathers the buckets of a buffer without the padding between them, and cuts out each parameter's state where
    the parameter lies with it. An embedding that two pipeline stages have (further predictions, tied weights) has a
    bucket of its own, and what lies behind a padded bucket was saved shifted.
    """
    if not _finds_states_behind_padding():
        repair(DistributedOptimizer, "sharded_param_state_fully_reshardable", _sharded_with_padding)


def _finds_states_behind_padding() -> bool:
    """Whether a state that was gathered without padding is cut out right behind a bucket of three, padded to four."""
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    buckets = [SimpleNamespace(offset=offset, numel_unpadded=size) for offset, size in ((0, 3), (4, 2), (8, 4))]
    ranges = {first: (0, 3, 0), second: (4, 6, 1)}
    optimizer = object.__new__(DistributedOptimizer)
    optimizer.buffers = [SimpleNamespace(numel=12, numel_unpadded=9, buckets=buckets, param_index_map=ranges)]
    optimizer.gbuf_ranges = [{"dtype": [{}, {}, {}]}]
    gathered = torch.arange(9.0)
    optimizer.get_parameter_state_dp_zero = lambda *args, **kwargs: {0: {"dtype": {"param": gathered}}}
    model = {name: ShardedTensor.from_rank_offsets(name, data) for name, data in (("a", first), ("b", second))}
    try:
        states = DistributedOptimizer.sharded_param_state_fully_reshardable(optimizer, model, metadata={})
        return torch.equal(states[1]["param"].data, gathered[3:5])
    except Exception:  # a wrong "no" costs nothing: what was gathered with its padding is not padded again
        return False


def _sharded_with_padding(stock: Callable) -> Callable:
    def sharded(self, *args, **kwargs):
        gather = self.get_parameter_state_dp_zero

        def gather_with_padding(*args, **kwargs):
            state = gather(*args, **kwargs)
            for i, buffer in enumerate(self.buffers if state is not None else ()):
                for dtype, tensors in state[i].items():
                    state[i][dtype] = {
                        key: _with_padding(value, buffer) if isinstance(value, torch.Tensor) else value
                        for key, value in tensors.items()
                    }
            return state

        self.get_parameter_state_dp_zero = gather_with_padding
        try:
            return stock(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded


def _with_padding(gathered: torch.Tensor, buffer: _ParamAndGradBuffer) -> torch.Tensor:
    """Buckets that follow each other without padding, put where they lie in the buffer.

    Anything longer than the buckets without padding was gathered with it and is returned as it is.
    """
    if gathered.numel() != sum(bucket.numel_unpadded for bucket in buffer.buckets):
        return gathered
    padded, start = gathered.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = gathered[start:end]
        start = end
    return padded


def load_experts_of_other_groups() -> None:
    """Let a checkpoint move experts between the dense layers' data-parallel group and one of their own (EP1, EP2).

    In the second case Megatron chains two optimizers and saves their parameter groups under numbers; it loads neither
    arrangement into the other, although the tensors are the same.
    """
    if not _loads_either_arrangement():
        repair(ChainedOptimizer, "load_state_dict", _load_either)


def _load_either(stock: Callable) -> Callable:
    def load_state_dict(self, state_dict, *args, **kwargs):
        if isinstance(state_dict, dict):
            state_dict = _arranged(state_dict, self.chained_optimizers)
        stock(self, state_dict, *args, **kwargs)

    return load_state_dict


class _Recorder:
    """An optimizer that keeps what it is given."""

    def __init__(self, experts: bool):
        self.param_groups = [{"is_expert_parallel": experts}]
        self.loaded = {}

    def load_state_dict(self, state_dict: dict) -> None:
        self.loaded = state_dict


def _loads_either_arrangement() -> bool:
    """Whether ``ChainedOptimizer.load_state_dict`` gives each optimizer its groups out of both arrangements."""
    one, two = [_Recorder(False)], [_Recorder(False), _Recorder(True)]
    part = {"optimizer": {"param_groups": [{"is_expert_parallel": False}]}}
    for optimizers, state in ((one, {0: part, 1: part}), (two, part)):
        chained = object.__new__(ChainedOptimizer)
        chained.chained_optimizers = optimizers
        try:
            ChainedOptimizer.load_state_dict(chained, state)
        except Exception:  # a wrong "no" costs nothing: a state that fits its optimizers is not arranged again
            return False
    return all("optimizer" in optimizer.loaded for optimizer in one + two)


def _arranged(state_dict: dict, optimizers: list) -> dict:
    """The state of one or of several optimizers as these want it."""
    numbered = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    common = {key: value for key, value in state_dict.items() if key not in numbered}
    if len(optimizers) == 1 and numbered and "optimizer" not in common:
        groups = [group for part in numbered.values() for group in part["optimizer"]["param_groups"]]
        return {**numbered[0], "optimizer": _groups_of(groups, experts=False), **common}
    if len(optimizers) > 1 and "optimizer" in common:
        groups = common["optimizer"]["param_groups"]
        return {
            i: {
                **common,
                "optimizer": _groups_of(groups, experts=optimizer.param_groups[0]["is_expert_parallel"]),
                **numbered.get(i, {}),
            }
            for i, optimizer in enumerate(optimizers)
        }
    return state_dict


def _groups_of(groups: list[dict], *, experts: bool) -> dict:
    return {"param_groups": [{**group, "is_expert_parallel": experts} for group in groups]}

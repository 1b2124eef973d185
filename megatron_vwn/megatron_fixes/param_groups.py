"""Megatron finds a saved parameter group by its learning rates, so that no run can go on with another one."""

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

from megatron_vwn.megatron_fixes.repair import repair

# Numbers of the schedule that stand in a group; what is left of its identity says which parameters it has.
_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")
_IDENTITY = tuple(key for key in param_group_identifier_keys if key not in _SCHEDULE)


def load_groups_of_another_schedule() -> None:
    """Let ``--override-opt-param-scheduler`` change ``--lr`` and ``--min-lr``.

    "Could not find parameter group" or a KeyError was the end of such a run. A saved group takes the numbers of the
    run's only group that has its identity otherwise; whether a run may change them is the schedule's to decide, which
    is loaded afterwards.
    """
    if not _finds_group_of_another_rate():
        repair(MegatronOptimizer, "_filter_and_reorder_param_groups", _with_rates_of_this_run)
    if not _distributed_finds_group_of_another_rate():
        repair(DistributedOptimizer, "load_state_dict", _loading_rates_of_this_run)


def _finds_group_of_another_rate() -> bool:
    try:
        MegatronOptimizer._filter_and_reorder_param_groups(
            [{"max_lr": 2.0, "params": []}], [{"max_lr": 1.0, "params": []}]
        )
    except (ValueError, KeyError):
        return False
    return True


def _distributed_finds_group_of_another_rate() -> bool:
    optimizer, loaded = object.__new__(DistributedOptimizer), []
    now = {"state": {}, "param_groups": [{"max_lr": 2.0, "params": []}]}
    optimizer.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    optimizer.optimizer = SimpleNamespace(
        state={0: {}}, param_groups=now["param_groups"], state_dict=lambda: now, load_state_dict=loaded.append
    )
    with suppress(Exception):  # this optimizer lacks what is used once the groups are loaded
        optimizer.load_state_dict({"optimizer": {"param_groups": [{"max_lr": 1.0, "step": 1, "params": []}]}})
    return bool(loaded)


def _with_rates_of_this_run(stock: Callable) -> Callable:
    def filter_and_reorder(current_groups, state_dict_groups, *more, **named):
        return stock(current_groups, _at_rates_of(current_groups, state_dict_groups), *more, **named)

    return filter_and_reorder


def _loading_rates_of_this_run(stock: Callable) -> Callable:
    def load_state_dict(self, state_dict, *more, **named):
        saved = state_dict.get("optimizer")
        if isinstance(saved, dict) and "param_groups" in saved:
            groups = _at_rates_of(self.optimizer.param_groups, saved["param_groups"])
            state_dict = {**state_dict, "optimizer": {**saved, "param_groups": groups}}
        return stock(self, state_dict, *more, **named)

    return load_state_dict


def _at_rates_of(current: list[dict], saved: list[dict]) -> list[dict]:
    """The saved groups; one that has no equal takes the schedule of the only current group that it can belong to."""
    keys = (*_IDENTITY, *_SCHEDULE)
    equals = {_identity(group, keys) for group in current} & {_identity(group, keys) for group in saved}
    open_ones = [group for group in current if _identity(group, keys) not in equals]
    found = []
    for group in saved:
        if _identity(group, keys) not in equals:
            alike = [each for each in open_ones if _identity(each, _IDENTITY) == _identity(group, _IDENTITY)]
            if len(alike) == 1:
                group = {**group, **{key: alike[0].get(key) for key in _SCHEDULE if key in alike[0] or key in group}}
        found.append(group)
    return found


def _identity(group: dict, keys: tuple[str, ...]) -> tuple:
    # NeMo writes wd_mult and lr_mult as pre_wd_mult and pre_lr_mult; a missing value is None.
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)

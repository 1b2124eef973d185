"""Megatron's distributed optimizer cannot resume with ``torch.optim.Adam``, the fallback where FusedAdam is missing."""

from collections.abc import Callable

import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_vwn.megatron_fixes.repair import repair


def resume_distributed_optimizer_with_torch_adam() -> None:
    """Let ``DistributedOptimizer`` save and resume ``torch.optim.Adam`` and ``AdamW`` exactly.

    Torch keeps a tensor "step" in each parameter's state, where FusedAdam keeps a number in the parameter group:

    - a fresh optimizer has no state to take the step from, so ``state_dict()``, called first of all by a load, fails;
    - "fully_reshardable" loads leave "step" out and fail on its absence; "dp_reshardable" ones bring the one that the
      fresh optimizer had, which would replace the step just restored from the parameter groups;
    - both copy into parameters that require gradients, "dp_reshardable" outside of ``no_grad``;
    - ``load_state_dict()`` gives one tensor to all parameters, so that every update would advance it once for each.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    repair(distrib_optimizer.DistributedOptimizer, "state_dict", _state_dict_of_fresh_optimizer_too)
    repair(distrib_optimizer.DistributedOptimizer, "load_state_dict", _load_state_dict_with_own_steps)
    repair(distrib_optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_states_but_step)


def _state_dict_of_fresh_optimizer_too(stock: Callable) -> Callable:
    def state_dict(self, *args, **kwargs):
        if not _is_torch_adam(self.optimizer):
            return stock(self, *args, **kwargs)
        try:
            return stock(self, *args, **kwargs)
        except AssertionError:  # "assert len(steps) == 1": no parameter has a step
            if any(self.optimizer.state.values()):
                raise
        _allocate_missing_state(self.optimizer, self.optimizer_state_keys)
        return stock(self, *args, **kwargs)

    return state_dict


def _load_state_dict_with_own_steps(stock: Callable) -> Callable:
    def load_state_dict(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        if _is_torch_adam(self.optimizer):
            taken = set()
            for state in self.optimizer.state.values():
                step = state.get("step")
                if isinstance(step, torch.Tensor):
                    if step.data_ptr() in taken:
                        state["step"] = step = step.clone()
                    taken.add(step.data_ptr())

    return load_state_dict


def _set_states_but_step(stock: Callable) -> Callable:
    def set_states(self, model_param, tensors, *args, **kwargs):
        if _is_torch_adam(self.optimizer):
            # Megatron leaves what is no tensor as it is; one that leaves "step" alone by itself ignores the entry.
            tensors = {**tensors, "step": None}
        with torch.no_grad():
            stock(self, model_param, tensors, *args, **kwargs)

    return set_states


def _is_torch_adam(optimizer) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _allocate_missing_state(optimizer: torch.optim.Optimizer, keys: tuple[str, ...]) -> None:
    """Give parameters that were never updated the state that Adam's first step would: zeros, on Adam's devices."""
    for group in optimizer.param_groups:
        step_on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                device = parameter.device if step_on_device else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state.update({key: torch.zeros_like(parameter, requires_grad=False) for key in keys})

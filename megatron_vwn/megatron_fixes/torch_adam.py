"""Megatron's distributed optimizer cannot resume with ``torch.optim.Adam``, the fallback where FusedAdam is missing."""

from functools import wraps

import torch
from megatron.core import __version__ as megatron_version
from megatron.core.optimizer import distrib_optimizer

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes.contract import expect_function


def resume_distributed_optimizer_with_torch_adam() -> None:
    """Let ``DistributedOptimizer`` save and resume ``torch.optim.Adam`` and ``AdamW`` exactly.

    Torch keeps a tensor "step" in each parameter's state, where FusedAdam keeps a number in the parameter group:

    - a fresh optimizer has no state to take the step from, so ``state_dict()``, called first of all by a load, fails;
    - "fully_reshardable" loads leave "step" out and fail on its absence; "dp_reshardable" ones bring the one that the
      fresh optimizer had, which would replace the step just restored from the parameter groups;
    - both copy into parameters that require gradients, "dp_reshardable" outside of ``no_grad``;
    - ``load_state_dict()`` gives one tensor to all parameters, so that every update would advance it once for each.
    """
    if not hasattr(distrib_optimizer, "HAVE_APEX_OR_TE"):
        raise VirtualWidthError(
            f"megatron-core {megatron_version} does not say whether its distributed optimizer uses torch's Adam "
            "(HAVE_APEX_OR_TE): install a 0.19 release."
        )
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    state_dict = expect_function(optimizer_class, "state_dict", "self")
    load_state_dict = expect_function(optimizer_class, "load_state_dict", "self", "state_dict")
    set_states = expect_function(
        optimizer_class, "_set_main_param_and_optimizer_states", "self", "model_param", "tensors"
    )

    @wraps(state_dict)
    def state_dict_of_fresh_optimizer_too(self):
        if _is_torch_adam(self.optimizer):
            _allocate_missing_state(self.optimizer, self.optimizer_state_keys)
        return state_dict(self)

    @wraps(load_state_dict)
    def load_state_dict_with_own_steps(self, loaded):
        load_state_dict(self, loaded)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    @wraps(set_states)
    def set_states_but_step(self, model_param, tensors):
        if _is_torch_adam(self.optimizer):
            tensors = {**tensors, "step": None}  # what is no tensor is left as it is
        with torch.no_grad():
            set_states(self, model_param, tensors)

    optimizer_class.state_dict = state_dict_of_fresh_optimizer_too
    optimizer_class.load_state_dict = load_state_dict_with_own_steps
    optimizer_class._set_main_param_and_optimizer_states = set_states_but_step


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

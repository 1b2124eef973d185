"""What trains the models of the parallel checks."""

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from parallel import harness
from parallel.harness import expect


def losses_of(session: harness.Session, step: int = 0) -> list[float]:
    """Forward and backward of one global batch: the loss of the next token and of each further one."""
    loss = harness.forward_backward(session, step)
    return [loss, *(harness.further_losses(session) if session.config.mtp_num_layers else [])]


def optimizer_of(session: harness.Session, optimizer: str = "adam", **further):
    config = OptimizerConfig(
        optimizer=optimizer,
        lr=1e-2,
        weight_decay=0.1,
        use_distributed_optimizer=session.layout.distributed_optimizer,
        **{"clip_grad": 1.0, **further},
    )
    return get_megatron_optimizer(config, session.chunks)


def train(session: harness.Session, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        # Without it the fp32 optimizer's p.grad is still main_grad, and the next backward adds it to itself.
        optimizer.zero_grad()
        losses += losses_of(session, step)
        successful, _, _ = optimizer.step()
        expect(successful, "a step was skipped")
    return losses


def optimizer_for(kind: str, session: harness.Session, **further):
    """Adam, Muon, or Muon whose work data-parallel ranks share by layers."""
    if kind == "adam":
        return optimizer_of(session)
    # The default precision is bf16, in which the iteration makes more of another order of sums.
    settings = {"muon_tp_mode": "duplicated", "muon_fp32_matmul_prec": "high", "muon_nesterov": True}
    if session.config.bf16:
        settings |= {"bf16": True, "params_dtype": torch.bfloat16}
    if kind == "layers of muon":
        settings["use_layer_wise_distributed_optimizer"] = True
    return optimizer_of(session, "muon", **{**settings, **further})

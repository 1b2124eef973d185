"""Whether a resumed run's optimizer and schedule can take what the checkpoint holds of them.

Megatron asserts that a schedule's numbers are equal, in words of its own and after everything is built; of the
optimizer it takes the checkpoint's settings in silence, or fails on the names of tensors.
"""

import argparse
from dataclasses import fields

from megatron.core.optimizer import OptimizerConfig

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.refusals.checkpoint import Checkpoint

_LENGTH = ("train_iters", "train_samples", "global_batch_size")
# What the checkpoint's schedule is, beside its length.
_SCHEDULE = (
    "lr",
    "min_lr",
    "decoupled_lr",
    "decoupled_min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "lr_warmup_init",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "weight_decay",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
)
# Neither part of an optimizer's state nor kept with it: what a run gives of these holds at once.
_AT_ONCE = """
clip_grad grad_norm_skip_threshold loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
overlap_param_gather overlap_param_gather_with_optimizer_step overlap_cpu_optimizer_d2h_h2d pin_cpu_grads
pin_cpu_params reuse_grad_buf_for_mxfp8_param_ag optimizer_cuda_graph log_num_zeros_in_grad barrier_with_L1_time timers
config_logger_dir fp8_recipe muon_fp32_matmul_prec muon_tp_mode main_grads_dtype use_torch_optimizer_for_cpu_offload
"""
_FREE = frozenset((*_AT_ONCE.split(), *_SCHEDULE))
_COMPARED = (
    *(each.name for each in fields(OptimizerConfig) if each.name not in _FREE),
    "no_weight_decay_cond_type",
    "use_layer_wise_param_layout",
)


def refuse_other_optimizer(checkpoint: Checkpoint, args: argparse.Namespace) -> list[str]:
    """Refuse a run whose optimizer or schedule is not the checkpoint's, unless a flag says whose schedule is meant.

    Under ``--use-checkpoint-opt-param-scheduler`` the checkpoint's schedule is set in ``args``.

    Args:
        checkpoint: what training starts from.
        args: Megatron's arguments, validated.

    Returns:
        What the run changes of the schedule, each in words.

    Raises:
        VirtualWidthError: the optimizer cannot be loaded, the schedule differs, or training would run out of data.
    """
    if checkpoint.args is None or checkpoint.weights_alone(args) or args.no_load_optim:
        return []
    saved = checkpoint.completed_args(args)
    if saved.no_save_optim:
        return []
    _refuse_other_state(checkpoint.folder, saved, args)
    _refuse_moved_experts(checkpoint.folder, saved, args)
    theirs, ours = _schedule(saved), _schedule(args)
    changed = [
        name
        for name in (*_LENGTH, *_SCHEDULE)
        if theirs[name] != ours[name] and getattr(saved, name) != getattr(args, name)
    ]
    override, keep = args.override_opt_param_scheduler, args.use_checkpoint_opt_param_scheduler
    if override and keep:
        raise VirtualWidthError(
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other: drop one."
        )
    if changed and not (override or keep):
        raise VirtualWidthError(
            f"the checkpoint in {checkpoint.folder} was trained with {_typed(saved, changed)}, but this run has "
            f"{_typed(args, changed)}: add --override-opt-param-scheduler to go on by this run's schedule, "
            "--use-checkpoint-opt-param-scheduler to keep the checkpoint's, or give the checkpoint's settings."
        )
    _refuse_want_of_data(checkpoint, args)
    if not keep:
        return [f"{_flag(name)} {getattr(saved, name)} -> {getattr(args, name)}" for name in changed]
    kept = [name for name in changed if name not in _LENGTH]
    for name in _SCHEDULE:
        setattr(args, name, getattr(saved, name))
    return [f"{_typed(saved, kept)} is kept"] if kept else []


def _refuse_other_state(folder: str, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    different = [name for name in _COMPARED if hasattr(args, name) and getattr(saved, name) != getattr(args, name)]
    if {"bf16", "fp16"} & set(different):  # the others follow
        different = [name for name in different if name in ("bf16", "fp16")]
    if different:
        raise VirtualWidthError(
            f"the optimizer of the checkpoint in {folder} was saved with {_typed(saved, different)}, but this run has "
            f"{_typed(args, different)}: give the checkpoint's settings, or add --no-load-optim for a new optimizer "
            "and a schedule from its start."
        )


def _refuse_moved_experts(folder: str, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    """Muon's groups of experts that have a data-parallel group of their own are lists of another length in the file."""
    sizes = saved.expert_model_parallel_size, args.expert_model_parallel_size
    if args.optimizer == "muon" and args.num_experts and (sizes[0] > 1) != (sizes[1] > 1):
        raise VirtualWidthError(
            "Megatron 0.19 cannot load Muon's state of experts that was saved with --expert-model-parallel-size "
            f"{sizes[0]} (the checkpoint in {folder}) with {sizes[1]}: give {'at least 2' if sizes[0] > 1 else 1}, or "
            "add --no-load-optim for a new optimizer and a schedule from its start."
        )


def _refuse_want_of_data(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """A run that counts steps makes a data set of so many batches, of which larger batches have used more.

    A cyclic loader begins again, and batches that grow are of no one size.
    """
    used = checkpoint.completed_args(args).consumed_train_samples
    if (
        checkpoint.iteration is not None
        and not (args.train_samples or args.dataloader_type == "cyclic" or args.step_batch_size_schedule)
        and used > checkpoint.iteration * args.global_batch_size
    ):
        raise VirtualWidthError(
            f"the checkpoint in {checkpoint.folder} has seen {used} samples in {checkpoint.iteration} steps, but the "
            f"data of this run are counted at --global-batch-size {args.global_batch_size} from the first step and "
            "would end too soon: give at least the checkpoint's batch size, or count --train-samples."
        )


def _schedule(args: argparse.Namespace) -> dict[str, object]:
    """The schedule's arguments, as Megatron completes them when it builds the schedule."""
    found = {name: getattr(args, name) for name in (*_LENGTH, *_SCHEDULE)}
    if found["train_samples"]:  # the schedule is in samples, however many are in a step
        found["train_iters"] = found["global_batch_size"] = None
    for unit, length in (("iters", "train_iters"), ("samples", "train_samples")):
        # Of a run that says nothing else, the schedule is as long as the training: one difference, not two.
        if found[f"lr_decay_{unit}"] == found[length]:
            found[f"lr_decay_{unit}"] = None
    for name in ("start_weight_decay", "end_weight_decay"):
        if found[name] == found["weight_decay"]:
            found[name] = None
    return found


def _typed(args: argparse.Namespace, names: list[str]) -> str:
    return " ".join(f"{_flag(name)} {getattr(args, name)}" for name in names)


def _flag(name: str) -> str:
    if name == "use_layer_wise_distributed_optimizer":  # what Megatron makes of the flag where the optimizer is Muon
        name = "use_distributed_optimizer"
    return f"--{name.replace('_', '-')}"

"""What ``--optimizer`` can be, with and without a virtual width: rows of the table of refusals.

Whatever is accepted gives the same update in every layout, up to the order of sums; modules/muon.py says which
parameters Muon trains.
"""

import argparse
from collections.abc import Callable

from megatron.core.optimizer.emerging_optimizers import HAVE_EMERGING_OPTIMIZERS, get_supported_coefficient_types

Args = argparse.Namespace
Rules = tuple[tuple[Callable[[Args], object], str], ...]

MUON = ("muon", "dist_muon")


def divides_layers(args: Args) -> bool:
    """Whether data-parallel ranks share Muon's work layer by layer; of arguments that are not validated yet."""
    return args.optimizer == "dist_muon" or (args.optimizer == "muon" and args.use_distributed_optimizer)


def _splits_matrices(args: Args) -> bool:
    return args.tensor_model_parallel_size > 1 or (args.expert_tensor_parallel_size or 1) > 1


def _splits_a_query_group(args: Args) -> bool:
    return args.group_query_attention and args.num_query_groups % args.tensor_model_parallel_size


def _wants_unknown_coefficients(args: Args) -> bool:
    known = set(get_supported_coefficient_types()) - {"custom"}  # no flag gives them
    return args.muon_coefficient_type not in known


# For every run, the ordinary model included: each would be a traceback of Megatron's, some in the first step.
OPTIMIZER_RULES: Rules = (
    (
        lambda args: args.optimizer == "adaptive_muon",
        "--optimizer adaptive_muon fails inside Megatron 0.19 with emerging-optimizers 0.3: choose muon.",
    ),
    (
        lambda args: args.optimizer not in ("adam", "sgd") and not HAVE_EMERGING_OPTIMIZERS,
        "--optimizer muon, lion and soap need the package emerging-optimizers: install the extra muon or choose adam.",
    ),
    (
        lambda args: args.optimizer not in ("adam", "sgd") and args.fp16,
        "--optimizer muon, lion and soap cannot train in fp16: give --bf16 in place of --fp16.",
    ),
    (
        lambda args: divides_layers(args) and not args.bf16,
        "--optimizer dist_muon, or muon with --use-distributed-optimizer, trains in bf16 only: add --bf16, or give "
        "--optimizer muon alone.",
    ),
    (
        lambda args: divides_layers(args) and args.num_distributed_optimizer_instances > 1,
        "--num-distributed-optimizer-instances cannot be given with Muon's distributed optimizer: drop it.",
    ),
    (
        lambda args: (
            divides_layers(args) and args.num_experts and args.expert_model_parallel_size > 1 and args.add_bias_linear
        ),
        "Muon's distributed optimizer cannot train biases of experts with --expert-model-parallel-size: add "
        "--disable-bias-linear, or give --optimizer muon alone.",
    ),
    (
        lambda args: args.optimizer in MUON and args.overlap_param_gather_with_optimizer_step,
        "--overlap-param-gather-with-optimizer-step cannot be given with Muon: drop it.",
    ),
    (
        lambda args: (
            args.optimizer in (*MUON, "sgd") and (args.use_precision_aware_optimizer or args.optimizer_cpu_offload)
        ),
        "--use-precision-aware-optimizer and --optimizer-cpu-offload belong to adam: drop them, or choose adam.",
    ),
    (
        lambda args: args.optimizer in MUON and _wants_unknown_coefficients(args),
        "--muon-coefficient-type is not one that the installed emerging-optimizers has: choose quintic, its default.",
    ),
    (lambda args: args.muon_num_ns_steps < 1, "--muon-num-ns-steps must be at least 1: give another."),
    (
        lambda args: args.optimizer == "sgd" and args.use_distributed_optimizer,
        "--optimizer sgd has no state that --use-distributed-optimizer could divide: drop that, or choose adam.",
    ),
    (
        lambda args: (
            args.optimizer == "sgd"
            and ((args.save and not args.no_save_optim) or (args.load and not (args.no_load_optim or args.finetune)))
        ),
        "Megatron 0.19 saves the momentum of --optimizer sgd, but cannot load it: add --no-save-optim and "
        "--no-load-optim, or choose adam.",
    ),
)

# With --vwn-m and --vwn-n.
WIDE_OPTIMIZER_RULES: Rules = (
    (
        lambda args: args.optimizer == "lion",
        "--optimizer lion would train matrices with Adam's betas whatever --lion-beta1 says: choose adam or muon.",
    ),
    (
        lambda args: args.optimizer not in ("adam", "sgd", *MUON),
        "--optimizer must be adam, sgd, muon or dist_muon with a virtual width: soap computes another update in each "
        "tensor-parallel layout.",
    ),
    (
        lambda args: args.optimizer in MUON and args.muon_tp_mode == "blockwise" and _splits_matrices(args),
        "--muon-tp-mode blockwise, the default, makes each rank's part of a matrix orthogonal by itself, which is "
        "another update in each layout: give --muon-tp-mode duplicated or distributed.",
    ),
    (
        lambda args: args.optimizer in MUON and args.muon_split_qkv and _splits_a_query_group(args),
        "Muon cannot split queries, keys and values where --tensor-model-parallel-size divides a query group: add "
        "--muon-no-split-qkv, or give fewer ranks.",
    ),
)

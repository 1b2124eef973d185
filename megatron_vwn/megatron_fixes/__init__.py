"""Repairs of the released megatron-core, one file per fault; ``apply_fixes`` makes all of them.

Needed on a GPU as much as on a CPU. Each repair first looks whether it is needed and whether Megatron still is what it
repairs. ``apply_fixes`` imports Megatron: without a GPU, ``megatron_vwn.cpu.install()`` comes first.
"""

from functools import cache


@cache
def apply_fixes() -> None:
    """Repair Megatron in this process, once; call it before ``pretrain()`` or before building an optimizer.

    Raises:
        VirtualWidthError: if this version of Megatron has not the functions that the repairs were written for.
    """
    from megatron_vwn.megatron_fixes.dataset_helpers import skip_makefile_of_dataset_helpers
    from megatron_vwn.megatron_fixes.resharding import load_experts_of_other_groups, save_states_where_parameters_lie
    from megatron_vwn.megatron_fixes.torch_adam import resume_distributed_optimizer_with_torch_adam

    skip_makefile_of_dataset_helpers()
    resume_distributed_optimizer_with_torch_adam()
    save_states_where_parameters_lie()
    load_experts_of_other_groups()

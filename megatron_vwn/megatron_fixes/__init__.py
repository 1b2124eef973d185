"""Repairs of the released megatron-core, one file per fault; ``apply_fixes`` makes all of them.

They are needed on a GPU as much as on a CPU. ``contract`` lists every name of Megatron that this package depends on
beyond its public interface; a drifted one is refused before anything is repaired. Each repair acts only where the fault
is met. ``apply_fixes`` imports Megatron: without a GPU, ``megatron_vwn.cpu.install()`` comes first.
"""

from importlib.util import find_spec


def apply_fixes() -> None:
    """Repair Megatron in this process; call it before ``pretrain()`` or before building an optimizer.

    A second call changes nothing.

    Raises:
        VirtualWidthError: if the installed Megatron is not the one that this package was written for.
    """
    from megatron_vwn.megatron_fixes.contract import check_contract

    check_contract()  # before the imports below, which would fail without a sentence

    from megatron_vwn.megatron_fixes.children import end_helpers_with_their_rank
    from megatron_vwn.megatron_fixes.dataset_helpers import skip_makefile_of_dataset_helpers
    from megatron_vwn.megatron_fixes.extra_states import load_without_extra_states
    from megatron_vwn.megatron_fixes.param_groups import load_groups_of_another_schedule
    from megatron_vwn.megatron_fixes.pickles import unpickle_known_classes
    from megatron_vwn.megatron_fixes.resharding import load_experts_of_other_groups, save_states_where_parameters_lie
    from megatron_vwn.megatron_fixes.sample_index import find_sample_indices_by_content
    from megatron_vwn.megatron_fixes.torch_adam import resume_distributed_optimizer_with_torch_adam

    skip_makefile_of_dataset_helpers()
    resume_distributed_optimizer_with_torch_adam()
    save_states_where_parameters_lie()
    load_experts_of_other_groups()
    find_sample_indices_by_content()
    unpickle_known_classes()
    load_groups_of_another_schedule()
    load_without_extra_states()
    end_helpers_with_their_rank()
    if find_spec("megatron.training") is not None:  # megatron-core can be installed without
        from megatron_vwn.megatron_fixes.tracker import write_tracker_beside

        write_tracker_beside()

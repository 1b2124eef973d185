"""Whether a run is refused: every check, in the order in which a user would want to hear of what is wrong.

A run is asked as soon as more is known of it: ``refuse_argv`` about what is typed, ``refuse_start`` about the
checkpoint, ``refuse`` about the arguments that a checkpoint may have completed, ``refuse_other_training`` about what
Megatron made of them, ``refuse_document_end`` and ``refuse_vocabulary`` about the tokenizer. The parser raises refusals
of its own, and Megatron validates what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.training import get_tokenizer

from megatron_vwn.training.ranks import first_of_node
from megatron_vwn.training.refusals.checkpoint import (
    refuse_missing,
    refuse_other_backend,
    refuse_other_document_end,
    refuse_other_vocabulary,
    refuse_other_width,
)
from megatron_vwn.training.refusals.data import check_data, check_vocabularies, data_prefixes
from megatron_vwn.training.refusals.flags import refuse_unsupported, refuse_yaml
from megatron_vwn.training.refusals.folders import check_folders
from megatron_vwn.training.refusals.function import refuse_other_function
from megatron_vwn.training.refusals.kernels import refuse_kernels
from megatron_vwn.training.refusals.megatron import quoting_megatron
from megatron_vwn.training.refusals.monitoring import check_event_folder, check_monitoring
from megatron_vwn.training.refusals.optimizer import refuse_other_optimizer
from megatron_vwn.training.refusals.resumed_data import changed_data
from megatron_vwn.training.refusals.size import refuse_too_large
from megatron_vwn.training.refusals.unknown import refuse_unknown
from megatron_vwn.training.refusals.versions import refuse_versions

if TYPE_CHECKING:
    from megatron_vwn.training.run import Run


def refuse_argv(argv: Sequence[str]) -> None:
    """Refuse what must not reach Megatron's parser, and another Megatron.

    Raises:
        VirtualWidthError: the sentence to print.
    """
    refuse_versions(argv)
    refuse_yaml(argv)


def refuse_start(run: Run) -> None:
    """Refuse a checkpoint of another virtual width, before ``--use-checkpoint-args`` takes arguments from it.

    Raises:
        VirtualWidthError: the sentence to print.
    """
    if run.checkpoint is not None:
        refuse_missing(run.checkpoint, run.args)
        refuse_other_width(run.checkpoint, run.virtual_width)
        refuse_other_backend(run.checkpoint, run.args)


def refuse(run: Run) -> None:
    """Refuse a run whose arguments are known, before Megatron validates them and before anything is built.

    Of a simulated run nothing is refused that depends on this machine: its files, its packages and its GPU.

    Raises:
        VirtualWidthError: the sentence to print.
    """
    refuse_unknown(run.args)
    with quoting_megatron():
        refuse_unsupported(run.args, run.virtual_width)
    if run.simulated:
        return
    with quoting_megatron():
        check_monitoring(run.args, run.virtual_width)
    if run.virtual_width is not None:
        refuse_too_large(run.args, run.virtual_width, gpu=run.gpu)
        refuse_kernels(run.args, run.virtual_width, gpu=run.gpu)
    if first_of_node():  # reads the index of every data set, which all ranks of a node need not do at once
        check_folders(run.args)
        check_event_folder(run.args)
        check_data(run.args)


def refuse_other_training(run: Run) -> tuple[list[str], list[str], list[str]]:
    """Refuse a checkpoint that the run would not go on with as it was trained; its arguments are validated.

    Returns:
        What the run changes on purpose: of the model's function, of the schedule, and of the data.

    Raises:
        VirtualWidthError: the sentence to print.
    """
    if run.checkpoint is None:
        return [], [], []
    return (
        refuse_other_function(run.checkpoint, run.args),
        refuse_other_optimizer(run.checkpoint, run.args),
        changed_data(run.checkpoint, run.args),
    )


def refuse_document_end(run: Run) -> None:
    """Refuse a tokenizer that contradicts the checkpoint's n-grams; Megatron has built it.

    Raises:
        VirtualWidthError: the sentence to print.
    """
    if run.checkpoint is not None and run.virtual_width is not None and run.virtual_width.ngrams:
        refuse_other_document_end(run.checkpoint, run.virtual_width.document_end)


def refuse_vocabulary(run: Run) -> None:
    """Refuse data or a checkpoint that another tokenizer made than the run's; Megatron has built it.

    Raises:
        VirtualWidthError: the sentence to print.
    """
    if run.checkpoint is not None:
        refuse_other_vocabulary(run.checkpoint, run.args, get_tokenizer().vocab_size)
    if first_of_node():
        check_vocabularies(data_prefixes(run.args), get_tokenizer())

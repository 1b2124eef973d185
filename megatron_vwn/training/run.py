"""One training run: from a command line to Megatron's ``pretrain()`` and an exit code."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tokenizer, initialize, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes
from megatron_vwn.parallel.pipeline import WideP2PCommunicator
from megatron_vwn.training.batch import forward_step, train_valid_test_datasets_provider
from megatron_vwn.training.flags.machine import complete_command_line, describe, needed_flags
from megatron_vwn.training.flags.vwn import add_arguments, record_virtual_width, virtual_width_from_args
from megatron_vwn.training.model import VirtualWidthModelConfig, model_config_from_args
from megatron_vwn.training.monitoring.monitor import monitored
from megatron_vwn.training.monitoring.writers import check_monitoring
from megatron_vwn.training.refusals.checkpoint import refuse_other_model
from megatron_vwn.training.refusals.data import check_data, check_vocabulary, data_prefixes
from megatron_vwn.training.refusals.flags import refuse_unsupported, refuse_yaml
from megatron_vwn.training.refusals.folders import check_folders
from megatron_vwn.training.refusals.kernels import describe_kernels

_REFUSED = 2
# More than the first rank of a node may lag behind the others while they import Megatron from a slow file system.
SECONDS_TO_BE_ENDED = 120


def run(argv: Sequence[str], *, gpu: bool) -> int:
    """Train with the given flags.

    Args:
        argv: the command line without the program's name.
        gpu: whether a GPU is present (not an emulated one).

    Returns:
        Exit code: 0 when training ended as the flags say, 2 for a refusal.
    """
    apply_fixes()
    try:
        args, virtual_width = prepare(argv, gpu=gpu)
        set_global_variables(args)
        if virtual_width is not None and virtual_width.ngrams:
            virtual_width = replace(virtual_width, document_end=get_tokenizer().eod)
            record_virtual_width(args, virtual_width)
            refuse_other_model(args, virtual_width)
        if first_of_node():
            for prefix in data_prefixes(args):
                check_vocabulary(prefix, get_tokenizer())
        _train(args, virtual_width)
    except VirtualWidthError as refusal:
        # Before process groups exist all ranks of a node reach the same refusal; later it may concern one rank alone.
        if not torch.distributed.is_initialized() and not first_of_node():
            # torchrun ends all ranks as soon as one has ended, and that must not be before the refusal is printed.
            time.sleep(SECONDS_TO_BE_ENDED)
        else:
            print(f"megatron_vwn: {refusal}", file=sys.stderr, flush=True)
        return _REFUSED
    except SystemExit as leave:
        # Megatron leaves by sys.exit(0) when an exit flag ends training, and by sys.exit() where it gives up.
        if leave.code is None:
            return 1
        if leave.code != 0:
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def prepare(argv: Sequence[str], *, gpu: bool) -> tuple[argparse.Namespace, VirtualWidthConfig | None]:
    """Parse and validate a command line; every refusal that needs no process group happens here.

    Args:
        argv: the command line without the program's name.
        gpu: whether a GPU is present (not an emulated one).

    Returns:
        Megatron's validated arguments and the virtual width, None for the ordinary model.

    Raises:
        VirtualWidthError: the command line cannot be run.
    """
    argv, added = complete_command_line(argv, needed_flags(gpu=gpu, transformer_engine=HAVE_TE))
    if added:
        _say(describe(added))
    args, virtual_width = parse_flags(argv)
    start = refuse_other_model(args, virtual_width)
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
        start = refuse_other_model(args, virtual_width, complete=True)
    with quoting_megatron():
        refuse_unsupported(args, virtual_width)
        check_monitoring(args, virtual_width)
    if virtual_width is not None:
        kernels = describe_kernels(args, virtual_width, gpu=gpu)
    if first_of_node():  # reads the index of every data set, which all ranks of a node need not do at once
        check_folders(args)
        check_data(args)
    with quoting_megatron():
        validate_args(args)
    if virtual_width is not None:
        _say(f"{describe_virtual_width(args, virtual_width)}; {kernels}")
    if start is not None:
        _say(start)
    return args, virtual_width


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, VirtualWidthConfig | None]:
    """Parse a complete command line; nothing of Megatron's is validated.

    Raises:
        VirtualWidthError: unknown flags, or a virtual width that no model can have.
    """
    # Megatron parses the process's command line; it stays set because restarts and loggers read it again.
    sys.argv[1:] = argv
    refuse_yaml(argv)
    args = parse_args(add_arguments)
    virtual_width = virtual_width_from_args(args)
    if virtual_width is not None:
        record_virtual_width(args, virtual_width)
    return args, virtual_width


def describe_virtual_width(args: argparse.Namespace, virtual_width: VirtualWidthConfig) -> str:
    """One line about the stream of a run with these (validated) arguments."""
    partition = virtual_width.resolve_partition(
        tensor_parallel_size=args.tensor_model_parallel_size, sequence_parallel=args.sequence_parallel
    )
    ngrams = ""
    if virtual_width.ngrams:
        lengths = " and ".join(map(str, virtual_width.ngrams))
        ngrams = f" with n-grams of {lengths} tokens in {virtual_width.ngram_vocab:,} rows each"
    block = virtual_width.recompute_block
    recompute = "" if block is None else f", state of one in {block} sublayers kept"
    return (
        f"virtual width {float(virtual_width.expansion):g}x: {virtual_width.n} segments of "
        f"{virtual_width.segment_size(args.hidden_size)} channels around a backbone of {args.hidden_size}; "
        f"{virtual_width.connection} {virtual_width.gate} connections, {virtual_width.carry} carry, "
        f"{virtual_width.embedding} embedding{ngrams}, "
        f"{'' if virtual_width.reduce_norm else 'no '}norm before the reduction, {partition} partition{recompute}"
    )


def _train(args: argparse.Namespace, virtual_width: VirtualWidthConfig | None) -> None:
    with quoting_megatron():
        model = model_config_from_args(args, virtual_width)
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        monitored(forward_step, virtual_width),
        **pipeline_arguments(args, model),
    )


def pipeline_arguments(args: argparse.Namespace, model: VirtualWidthModelConfig) -> dict[str, object]:
    """What ``pretrain()`` needs to exchange over-width states between pipeline stages.

    The communicator wants process groups before ``pretrain()`` would make them. Megatron's own (private) function makes
    them here, because the public ones below it know nothing of its timeouts, backends, group options and flight
    recorder; ``pretrain()`` finds them made and goes on.
    """
    if model.virtual_width is None or args.pipeline_model_parallel_size == 1:
        return {}
    initialize._initialize_distributed(get_embedding_ranks=None, get_position_embedding_ranks=None, store=None)
    return {
        "p2p_communicator": WideP2PCommunicator(
            mpu.get_pipeline_model_parallel_group(), model.transformer, model.virtual_width
        ),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }


@contextmanager
def quoting_megatron() -> Iterator[None]:
    """Turn what Megatron's own validation raises, often a bare assertion, into one sentence that quotes it."""
    try:
        yield
    except VirtualWidthError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split()).rstrip(".") or frame.line
        raise VirtualWidthError(
            f"Megatron refuses these flags: {reason} ({os.path.basename(frame.filename)}:{frame.lineno})."
        ) from error


def first_of_node() -> bool:
    """Whether this is the process that speaks for its node; its end makes torchrun end the others."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _say(line: str) -> None:
    """Print for the user, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"megatron_vwn: {line}", flush=True)

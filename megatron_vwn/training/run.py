"""One training run: from a command line to Megatron's ``pretrain()`` and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tensorboard_writer, get_tokenizer, initialize, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables
from torch.distributed.checkpoint import CheckpointException

from megatron_vwn.cli import FAILED
from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes
from megatron_vwn.parallel.pipeline import WideP2PCommunicator
from megatron_vwn.training.batch import forward_step, train_valid_test_datasets_provider
from megatron_vwn.training.flags.machine import complete_command_line, describe, local_layers_cost, needed_flags
from megatron_vwn.training.flags.vwn import add_arguments, record_virtual_width, virtual_width_from_args
from megatron_vwn.training.interrupt import saving_when_interrupted
from megatron_vwn.training.model import VirtualWidthModelConfig, model_config_from_args
from megatron_vwn.training.monitoring.event_files import survive_failures
from megatron_vwn.training.monitoring.monitor import monitored
from megatron_vwn.training.ranks import say, say_refusal
from megatron_vwn.training.refusals.checkpoint import Checkpoint, describe_start, read_checkpoint, refusal_of_load
from megatron_vwn.training.refusals.folders import explain_full_disk
from megatron_vwn.training.refusals.kernels import describe_kernels, kernel_fallbacks
from megatron_vwn.training.refusals.megatron import kept_traceback, quoting_megatron
from megatron_vwn.training.refusals.refuse import (
    refuse,
    refuse_argv,
    refuse_document_end,
    refuse_other_training,
    refuse_start,
    refuse_vocabulary,
)
from megatron_vwn.training.refusals.tokenizer import build_tokenizer
from megatron_vwn.training.refusals.unknown import describe_untested
from megatron_vwn.training.refusals.versions import untested_packages


def run(argv: Sequence[str], *, gpu: bool) -> int:
    """Train with the given flags.

    Args:
        argv: the command line without the program's name.
        gpu: whether a GPU is present (not an emulated one).

    Returns:
        Exit code: 0 when training ended as the flags say, 1 when no checkpoint could be written, 2 for a refusal.
    """
    try:
        apply_fixes()
        this = Run.parse(argv, gpu=gpu)
        this.check()
        this.build()
        try:
            this.train()
        except VirtualWidthError:
            raise
        except (Exception, CheckpointException) as error:
            if line := explain_full_disk(error, this.args.save):
                print(f"megatron_vwn: {line} ({kept_traceback(error)}).", file=sys.stderr, flush=True)
                return FAILED
            raise
    except VirtualWidthError as refusal:
        return say_refusal(refusal)
    except CheckpointException as error:  # no Exception
        if (refusal := refusal_of_load(error, this.args)) is None:
            raise
        return say_refusal(refusal)
    except SystemExit as leave:
        # Megatron leaves by sys.exit(0) when an exit flag ends training, and by sys.exit() where it gives up.
        if leave.code is None:
            return 1
        if leave.code != 0:
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


@dataclass
class Run:
    """One run, which goes ``parse`` -> ``check`` -> ``build`` -> ``train``; a refusal ends it on any of these steps.

    Attributes:
        argv: the command line, completed with what this machine needs.
        args: Megatron's arguments; validated once the run is checked.
        virtual_width: None for the ordinary model; it knows the end of a document once the tokenizer is built.
        gpu: whether a GPU is present (not an emulated one).
        simulated: whether the run is only planned: nothing is said, and neither checkpoints nor data, folders or
            devices of this machine are looked at.
        checkpoint: what the run starts from; None before it is checked, and where nothing is to be loaded.
        model: what the model is built from; None before ``build``.
    """

    argv: list[str]
    args: argparse.Namespace
    virtual_width: VirtualWidthConfig | None
    gpu: bool
    simulated: bool = False
    checkpoint: Checkpoint | None = None
    model: VirtualWidthModelConfig | None = None

    @classmethod
    def parse(cls, argv: Sequence[str], *, gpu: bool, simulated: bool = False) -> Run:
        """Complete a command line with what this machine needs, and parse it.

        Args:
            argv: the command line without the program's name.
            gpu: whether a GPU is present (not an emulated one).
            simulated: whether the run is only planned; its layers are then Megatron's local ones.

        Raises:
            VirtualWidthError: flags that are unknown or cannot be used here, or a virtual width that no model can have.
        """
        needed = needed_flags(gpu=gpu, transformer_engine=HAVE_TE and not simulated)
        completed, added = complete_command_line(argv, needed)
        if added and not simulated:
            say(describe(added))
        return cls(completed, *parse_flags(completed), gpu=gpu, simulated=simulated)

    def check(self) -> None:
        """Refuse what cannot run and validate the rest; every refusal that needs no process group happens here.

        Raises:
            VirtualWidthError: the command line cannot be run.
        """
        if not self.simulated:
            self._find_start()
        refuse(self)
        untested = describe_untested(self.args) if self.args.allow_untested else None
        with quoting_megatron():
            validate_args(self.args)
        if self.simulated:
            return
        if self.virtual_width is not None:
            kernels = describe_kernels(self.args, self.virtual_width, gpu=self.gpu)
            say(f"{describe_virtual_width(self.args, self.virtual_width)}; {kernels}")
        for cost in (*untested_packages(), *self._fallbacks()):
            say(f"warning: {cost}.")
        if untested is not None:
            say(f"{untested}.")
        changes = refuse_other_training(self)
        if self.checkpoint is not None:
            say(describe_start(self.checkpoint, self.args, *changes))

    def build(self) -> None:
        """Set Megatron's global variables and describe the model; ``pretrain()`` builds it from that.

        Raises:
            VirtualWidthError: the tokenizer contradicts checkpoint or data, or Megatron refuses the model.
        """
        self.build_tokenizer()
        refuse_vocabulary(self)
        with quoting_megatron():
            self.model = model_config_from_args(self.args, self.virtual_width, get_tokenizer().vocab_size)

    def build_tokenizer(self) -> None:
        """Set Megatron's global variables, the tokenizer among them, and learn from it where documents end, and which
        rows of the vocabulary are tokens.

        Raises:
            VirtualWidthError: the tokenizer cannot be built, or the n-grams of the checkpoint end at another token.
        """
        set_global_variables(self.args, build_tokenizer=False)
        build_tokenizer(self.args)
        self.args.vwn_tokens = get_tokenizer().vocab_size  # for exports, which have no rows that pad
        if self.virtual_width is not None and self.virtual_width.ngrams:
            # The only setting of the stream that is not typed: it joins the others, recorded when flags were parsed.
            self.args.vwn_document_end = get_tokenizer().eod
            self.virtual_width = replace(self.virtual_width, document_end=self.args.vwn_document_end)
        refuse_document_end(self)

    def train(self) -> None:
        """Run Megatron's ``pretrain()`` on the model of ``build``.

        Raises:
            VirtualWidthError: no launcher started this process.
        """
        if "MASTER_ADDR" not in os.environ:
            raise VirtualWidthError(
                "nothing says where the ranks meet: start this with torchrun --nproc-per-node N -m "
                "megatron_vwn.training.pretrain."
            )
        if (writer := get_tensorboard_writer()) is not None:
            survive_failures(writer, partial(print, "megatron_vwn:", flush=True))
        with saving_when_interrupted(self.args):
            pretrain(
                pretrain_cfg_container_from_args(self.args, self.model),
                train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                monitored(forward_step, self.virtual_width),
                **pipeline_arguments(self.args, self.model),
            )

    def _fallbacks(self) -> list[str]:
        """What runs more slowly here than it could, and what that costs."""
        costs = [local_layers_cost(self.args, gpu=self.gpu)]
        if self.virtual_width is not None:
            costs += kernel_fallbacks(self.args, self.virtual_width, gpu=self.gpu)
        return [cost for cost in costs if cost is not None]

    def _find_start(self) -> None:
        """Look at the checkpoint, and take arguments from it if asked to."""
        self.checkpoint = read_checkpoint(self.args)
        refuse_start(self)
        if self.args.use_checkpoint_args:
            load_args_from_checkpoint(self.args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(self.args)


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, VirtualWidthConfig | None]:
    """Parse a complete command line; nothing of Megatron's is validated.

    Raises:
        VirtualWidthError: unknown flags, or a virtual width that no model can have.
    """
    # Megatron parses the process's command line; it stays set because restarts and loggers read it again.
    sys.argv[1:] = argv
    refuse_argv(argv)
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

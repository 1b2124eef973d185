"""Whether the checkpoint that Megatron is about to load can be read, and has the virtual width of this run.

Megatron knows nothing of ``--vwn-*``: some differences (the gate, say) leave every tensor's shape alone and would be
trained on in silence, others end in a list of missing keys. The rest of the model is compared in ``function``, the
optimizer and its schedule in ``optimizer``, the data in ``resumed_data``.
"""

import argparse
import copy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.training.checkpointing import _load_base_checkpoint, checkpoint_exists
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch.distributed.checkpoint import CheckpointException

from megatron_vwn.config import OF_THE_RUN, VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes.contract import drifted
from megatron_vwn.megatron_fixes.pickles import refusal_in
from megatron_vwn.tracker import RELEASE, TRACKER, steps_begun, tracked, whole_steps
from megatron_vwn.training.flags.vwn import typed, virtual_width_from_args
from megatron_vwn.training.refusals.megatron import kept_traceback

# The end of a document is the tokenizer's and compared apart.
_FREE = (*OF_THE_RUN, "document_end")
_FIXED = tuple(field.name for field in fields(VirtualWidthConfig) if field.name not in _FREE)


@dataclass(frozen=True)
class Checkpoint:
    """What is known of the checkpoint that ``--load`` or ``--pretrained-checkpoint`` points to.

    Attributes:
        folder: where it is looked for.
        exists: whether the folder holds one.
        args: the arguments it was saved with; None where it does not say.
        iteration: of training; None where it does not say.
        release: whether it has weights alone.
        remark: what is odd about the folder, for the line that says where training starts.
    """

    folder: str
    exists: bool
    args: argparse.Namespace | None = None
    iteration: int | None = None
    release: bool = False
    remark: str = ""

    def completed_args(self, args: argparse.Namespace) -> argparse.Namespace:
        """Its arguments; what an older Megatron, or a converter, did not record counts as this run has it."""
        return argparse.Namespace(**{**vars(args), **vars(self.args)})

    def weights_alone(self, args: argparse.Namespace) -> bool:
        """Whether a run begins anew with its weights: they are a release, or the flags say so."""
        return self.release or args.finetune or self.folder != args.load


def read_checkpoint(args: argparse.Namespace) -> Checkpoint | None:
    """Look at the checkpoint that Megatron would choose; None if nothing is to be loaded.

    Through Megatron's own (private) reader, because the choice depends on ``--ckpt-step``, non-persistent checkpoints
    and formats, and comparing with another checkpoint than the one loaded would be worse than none.

    Args:
        args: parsed flags; process groups need not exist.

    Raises:
        VirtualWidthError: the checkpoint cannot be read.
    """
    folder = args.load
    if args.pretrained_checkpoint is not None and not checkpoint_exists(folder):
        folder = args.pretrained_checkpoint
    if folder is None:
        return None
    quiet = copy.copy(args)
    quiet.exit_on_missing_checkpoint = False  # Megatron would leave with exit code 0
    remark = _remark(Path(folder), args.ckpt_step)
    try:
        found = _load_base_checkpoint(folder, quiet, rank0=True)
    except VirtualWidthError:
        raise
    # Whatever a damaged file provokes; a CheckpointException is no Exception, and for some faults Megatron just leaves.
    except (Exception, CheckpointException, SystemExit) as error:
        if (refusal := refusal_in(error)) is not None:
            raise VirtualWidthError(f"{folder}: {refusal}") from error
        fault = "Megatron gave up" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        reason = fault.strip().splitlines()[-1]  # a CheckpointException carries the cause's traceback as its text
        raise VirtualWidthError(
            f"the checkpoint in {folder} cannot be read ({reason}; {kept_traceback(error)}): choose another with "
            "--ckpt-step or --load."
        ) from error
    if not (isinstance(found, tuple) and len(found) == 4 and isinstance(found[0], dict | None)):
        raise drifted("_load_base_checkpoint returns something else than four values, the first a dictionary")
    state, _, release, _ = found
    if state is None:
        return Checkpoint(folder, exists=False, remark=remark)
    return Checkpoint(folder, True, state.get("args"), state.get("iteration"), release, remark)


def _remark(folder: Path, step: int | None) -> str:
    """What is odd about the folder that is loaded from: a lost tracker, checkpoints that were only begun.

    Raises:
        VirtualWidthError: nothing says which of the folder's checkpoints are whole.
    """
    last = tracked(folder)
    if step and last == RELEASE:
        raise VirtualWidthError(
            f"--ckpt-step is {step}, but Megatron would load the release that {folder / TRACKER} names: write {step} "
            "into that file, or drop --ckpt-step."
        )
    if step or last is not None:
        return ""
    if whole_steps(folder):
        return f", its newest whole checkpoint ({TRACKER} is missing or empty)"
    begun = sorted(steps_begun(folder))
    for path in begun:
        if any(path.glob("mp_rank_*")):
            raise VirtualWidthError(
                f"{folder} holds {path.name} but no {TRACKER}, and nothing says whether it is whole: name it with "
                "--ckpt-step, or give another --load."
            )
    return f" that is whole ({', '.join(path.name for path in begun)} begun)" if begun else ""


def refusal_of_load(error: BaseException, args: argparse.Namespace) -> VirtualWidthError | None:
    """The sentence about what Megatron met when it loaded the checkpoint; None where it was at something else.

    Args:
        error: what ``pretrain()`` raised.
        args: of the run.
    """
    if (refusal := refusal_in(error)) is not None:
        return refusal
    if not any(frame.name == "load_checkpoint" for frame in traceback.extract_tb(error.__traceback__)):
        return None
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    said = str(cause).strip().strip("\"'").partition(":")[0].partition("\n")[0]  # before a list of all tensors
    reason = said[:200] or type(cause).__name__
    return VirtualWidthError(
        f"the checkpoint in {args.load or args.pretrained_checkpoint} cannot be loaded ({reason}): tensors of it "
        "are damaged or missing, so choose another with --ckpt-step or --load."
    )


def refuse_missing(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Refuse a folder without a checkpoint where ``--exit-on-missing-checkpoint`` demands one.

    Raises:
        VirtualWidthError: there is none.
    """
    if not checkpoint.exists and args.exit_on_missing_checkpoint:
        raise VirtualWidthError(
            f"{checkpoint.folder} holds no checkpoint, which --exit-on-missing-checkpoint demands: correct --load or "
            "drop it."
        )


def refuse_other_width(checkpoint: Checkpoint, current: VirtualWidthConfig | None) -> None:
    """Refuse a checkpoint of another virtual width than this run's; None is the ordinary model.

    Raises:
        VirtualWidthError: one of the two is an ordinary model, or a setting of the model differs.
    """
    if checkpoint.args is None:
        return
    folder, saved = checkpoint.folder, virtual_width_from_args(checkpoint.args)
    if saved is None and current is None:
        return
    if saved is None or current is None:
        raise VirtualWidthError(
            f"the checkpoint in {folder} was trained {_describe(saved)}, but this run is started {_describe(current)}: "
            f"start it {_describe(saved)}, or give another --load."
        )
    different = [name for name in _FIXED if getattr(saved, name) != getattr(current, name)]
    if different:
        raise VirtualWidthError(
            f"the checkpoint in {folder} was trained with {_settings(saved, different)}, but this run has "
            f"{_settings(current, different)}: give the checkpoint's settings, or another --load."
        )


def refuse_other_backend(checkpoint: Checkpoint, current: argparse.Namespace) -> None:
    """Refuse a checkpoint whose tensors are named for another backend: Transformer Engine's layers hold their norms.

    Raises:
        VirtualWidthError: the backends differ.
    """
    theirs, ours = getattr(checkpoint.args, "transformer_impl", None), current.transformer_impl
    if theirs is not None and (theirs == "local") != (ours == "local"):
        raise VirtualWidthError(
            f"the checkpoint in {checkpoint.folder} names its tensors for --transformer-impl {theirs}, but this run "
            f"has {ours}: give it {theirs}, or name them by vwn-convert (to-hf, then from-hf) or vwn-widen with "
            f"--transformer-impl {ours}."
        )


def refuse_other_document_end(checkpoint: Checkpoint, document_end: int) -> None:
    """Refuse a tokenizer that ends documents with another token than the n-grams of the checkpoint know.

    Raises:
        VirtualWidthError: the tokens differ.
    """
    saved = getattr(checkpoint.args, "vwn_document_end", None)
    if saved is not None and saved != document_end:
        raise VirtualWidthError(
            f"the n-grams of the checkpoint in {checkpoint.folder} end at token {saved}, but this run's tokenizer ends "
            f"documents with {document_end}: give the checkpoint's tokenizer, or another --load."
        )


def refuse_other_vocabulary(checkpoint: Checkpoint, args: argparse.Namespace, tokens: int) -> None:
    """Refuse a tokenizer of another size than the checkpoint's, whose table Megatron would load as far as it goes.

    Args:
        checkpoint: what training starts from.
        args: Megatron's arguments with the padded vocabulary, whose padding depends on the layout.
        tokens: the size of this run's tokenizer.

    Raises:
        VirtualWidthError: the checkpoint's table is of another tokenizer.
    """
    if checkpoint.args is None or checkpoint.weights_alone(args):
        return
    saved = checkpoint.completed_args(args)
    rows = calculate_padded_vocab_size(
        tokens, saved.make_vocab_size_divisible_by, saved.tensor_model_parallel_size, logging_enabled=False
    )
    if rows != saved.padded_vocab_size and (
        args.padded_vocab_size != saved.padded_vocab_size or tokens > saved.padded_vocab_size
    ):
        raise VirtualWidthError(
            f"the vocabulary of the checkpoint in {checkpoint.folder} has {saved.padded_vocab_size} rows, but the "
            f"{tokens} tokens of this run's tokenizer make {rows}: give the checkpoint's tokenizer (--vocab-size, or "
            "--padded-vocab-size if it was given), or another --load."
        )


def describe_start(
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    function: Sequence[str],
    schedule: Sequence[str],
    data: Sequence[str],
) -> str:
    """One line about where training starts, and what the run changes of function, schedule and data."""
    folder = checkpoint.folder
    if not checkpoint.exists:
        return f"{folder} holds no checkpoint{checkpoint.remark}: training starts from the beginning"
    changed = f"; it changes the model's function: {', '.join(function)}" if function else ""
    changed += f"; of the schedule: {', '.join(schedule)}" if schedule else ""
    changed += f"; it changes the data: {', '.join(data)}" if data else ""
    if checkpoint.weights_alone(args):
        return f"training starts from iteration 0 with the weights in {folder}{checkpoint.remark}{changed}"
    fresh = ", with a new optimizer and schedule" if args.no_load_optim else ""
    return f"training resumes from iteration {checkpoint.iteration} in {folder}{checkpoint.remark}{fresh}{changed}"


def _describe(virtual_width: VirtualWidthConfig | None) -> str:
    return "without a virtual width" if virtual_width is None else f"with {_settings(virtual_width, ('m', 'n'))}"


def _settings(virtual_width: VirtualWidthConfig, names) -> str:
    return " ".join(typed(name, getattr(virtual_width, name)) for name in names)

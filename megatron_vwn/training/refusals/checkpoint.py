"""Whether the checkpoint that Megatron is about to load holds the model of this run.

Megatron compares layers, hidden size and heads when it loads, but knows nothing of ``--vwn-*``: some differences (the
gate, say) leave every tensor's shape alone and would be trained on in silence, others end in a list of missing keys. It
also leaves tensors behind that the model does not ask for (norms of queries and keys, biases), and says nothing of a
backbone that computes with them something else.
"""

import argparse
import copy
import traceback
from dataclasses import dataclass, fields

from megatron.training.checkpointing import _load_base_checkpoint, checkpoint_exists
from torch.distributed.checkpoint import CheckpointException

from megatron_vwn.config import OF_THE_RUN, VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes.pickles import refusal_in
from megatron_vwn.training.flags.vwn import typed, virtual_width_from_args

# The end of a document is the tokenizer's and compared apart.
_FREE = (*OF_THE_RUN, "document_end")
# Arguments that say which tensors there are: one that differs drops tensors of the checkpoint, or lacks some.
_STRUCTURE = ("qk_layernorm", "add_qkv_bias", "add_bias_linear", "normalization", "swiglu")
# Arguments that change what tensors of the same shapes compute; some are changed on purpose, for longer contexts say.
_FUNCTION = (
    "layernorm_epsilon",
    "rotary_base",
    "rotary_percent",
    "squared_relu",
    "window_size",
    "window_attn_skip_freq",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
)
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
    """

    folder: str
    exists: bool
    args: argparse.Namespace | None = None
    iteration: int | None = None
    release: bool = False


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
    try:
        state, _, release, _ = _load_base_checkpoint(folder, quiet, rank0=True)
    # Whatever a damaged file provokes; a CheckpointException is no Exception, and for some faults Megatron just leaves.
    except (Exception, CheckpointException, SystemExit) as error:
        if (refusal := refusal_in(error)) is not None:
            raise VirtualWidthError(f"{folder}: {refusal}") from error
        fault = "Megatron gave up" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        reason = fault.strip().splitlines()[-1]  # a CheckpointException carries the cause's traceback as its text
        raise VirtualWidthError(
            f"the checkpoint in {folder} cannot be read ({reason}): choose another with --ckpt-step or --load."
        ) from error
    if state is None:
        return Checkpoint(folder, exists=False)
    return Checkpoint(folder, True, state.get("args"), state.get("iteration"), release)


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


def refuse_other_model(checkpoint: Checkpoint, current: argparse.Namespace) -> None:
    """Refuse a checkpoint of another backbone, as far as tensors of it would be left behind.

    Args:
        checkpoint: its virtual width is this run's.
        current: parsed flags, those that ``--use-checkpoint-args`` takes from the checkpoint among them.

    Raises:
        VirtualWidthError: an argument that says which tensors there are differs.
    """
    for name in _STRUCTURE:
        theirs, ours = getattr(checkpoint.args, name, None), getattr(current, name)
        if theirs is not None and theirs != ours:
            raise VirtualWidthError(
                f"the checkpoint in {checkpoint.folder} was trained with {name} = {theirs}, but this run has {ours}: "
                "some of its tensors would be left behind, so give the checkpoint's setting, or another --load."
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


def describe_start(checkpoint: Checkpoint, args: argparse.Namespace) -> str:
    """One line about where training starts, and what the run changes of the checkpoint's function."""
    folder = checkpoint.folder
    if not checkpoint.exists:
        return f"{folder} holds no checkpoint: training starts from the beginning"
    changed = "" if checkpoint.args is None else _changes(checkpoint.args, args)
    if checkpoint.release or args.finetune:
        return f"training starts from iteration 0 with the weights in {folder}{changed}"
    return f"training resumes from iteration {checkpoint.iteration} in {folder}{changed}"


def _changes(saved: argparse.Namespace, current: argparse.Namespace) -> str:
    """What the run computes with the same tensors in another way."""
    changes = [
        f"{name} {getattr(saved, name)} -> {getattr(current, name)}"
        for name in _FUNCTION
        if hasattr(saved, name) and getattr(saved, name) != getattr(current, name)
    ]
    return f"; it changes the model's function: {', '.join(changes)}" if changes else ""


def _describe(virtual_width: VirtualWidthConfig | None) -> str:
    return "without a virtual width" if virtual_width is None else f"with {_settings(virtual_width, ('m', 'n'))}"


def _settings(virtual_width: VirtualWidthConfig, names) -> str:
    return " ".join(typed(name, getattr(virtual_width, name)) for name in names)

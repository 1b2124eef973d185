"""What Megatron-LM's own ``pretrain_hybrid.py`` calls where ``patches/`` was applied to a source checkout.

    vwn_gpu = not megatron_vwn.cpu.install()                       before Megatron is imported
    args = patched.parse_and_validate_args(..., gpu=vwn_gpu)       in place of Megatron's function
    model = patched.hybrid_config_from_args(args)                  in place of Megatron's function
    pretrain(..., **patched.pipeline(args, model))                 wide shapes between pipeline stages

Without ``--vwn-*`` flags each of them does what Megatron does. With them the run is that of
``megatron_vwn.training.pretrain``, flags, refusals and model, but for data and loss, which are the checkout's.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from megatron.training import arguments, get_tokenizer
from megatron.training.argument_utils import hybrid_config_from_args as ordinary_config_from_args
from megatron.training.models.hybrid import HybridModelConfig

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes
from megatron_vwn.training.flags.vwn import virtual_width_from_args
from megatron_vwn.training.model import model_config_from_args
from megatron_vwn.training.ranks import say_refusal
from megatron_vwn.training.refusals.checkpoint import read_checkpoint, refuse_other_width
from megatron_vwn.training.refusals.megatron import quoting_megatron
from megatron_vwn.training.refusals.refuse import refuse_vocabulary
from megatron_vwn.training.run import Run, pipeline_arguments


def parse_and_validate_args(
    extra_args_provider: Callable | None = None, args_defaults: Mapping[str, object] | None = None, *, gpu: bool
) -> argparse.Namespace:
    """Parse this process's command line and set Megatron's global variables; leaves with exit code 2 for a refusal.

    Args:
        extra_args_provider: further flags of the ordinary model; they are unknown to a run with a virtual width.
        args_defaults: values of arguments that are not typed.
        gpu: whether a GPU is present (not an emulated one).
    """
    argv, defaults = sys.argv[1:], dict(args_defaults or {})
    with _refusing():
        if not any(token.startswith(("--vwn-", "--no-vwn-")) for token in argv):
            args = arguments.parse_and_validate_args(extra_args_provider, args_defaults=defaults)
            _refuse_wide_checkpoint(args)
            return args
        apply_fixes()
        run = Run.parse([*argv, *_typed_defaults(argv, defaults)], gpu=gpu)
        run.check()
        if run.args.dataloader_type == "external":
            raise VirtualWidthError(
                "--dataloader-type external needs the data of megatron_vwn.training.pretrain: start that, or choose "
                "single or cyclic."
            )
        if run.virtual_width.log_interval is not None:
            raise VirtualWidthError(
                "--vwn-log-interval observes the forward step of megatron_vwn.training.pretrain: start that, or drop "
                "the flag."
            )
        run.build_tokenizer()
        refuse_vocabulary(run)
    return run.args


def hybrid_config_from_args(args: argparse.Namespace) -> HybridModelConfig:
    """The model that arguments describe, with their virtual width if they have one."""
    virtual_width = virtual_width_from_args(args)
    if virtual_width is None:
        return ordinary_config_from_args(args)
    with _refusing(), quoting_megatron():
        return model_config_from_args(args, virtual_width, get_tokenizer().vocab_size)


def pipeline(args: argparse.Namespace, model: HybridModelConfig) -> dict[str, object]:
    """Further arguments of ``pretrain()``: the communicator of over-width states, where stages exchange any."""
    return {} if virtual_width_from_args(args) is None else pipeline_arguments(args, model)


def _typed_defaults(argv: list[str], defaults: Mapping[str, object]) -> Iterator[str]:
    typed = {token.partition("=")[0] for token in argv}
    for name, value in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if flag not in typed:
            yield from (flag, str(value))


def _refuse_wide_checkpoint(args: argparse.Namespace) -> None:
    """Megatron would load the layers of a wide checkpoint into an ordinary model and leave its connections behind."""
    if args.load is None or args.ckpt_format != "torch_dist":
        return
    checkpoint = read_checkpoint(args)
    if checkpoint is not None:
        refuse_other_width(checkpoint, None)


@contextmanager
def _refusing() -> Iterator[None]:
    """Say a refusal in one line and leave, as ``run`` does: the first rank of a node before the others."""
    try:
        yield
    except VirtualWidthError as refusal:
        sys.exit(say_refusal(refusal))

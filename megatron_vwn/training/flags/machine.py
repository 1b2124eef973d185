"""Megatron flags that a machine without Transformer Engine, or without a GPU, cannot do without.

Megatron's defaults assume both and fail deep inside model construction. The flags are appended to the command line,
visibly and never against what the user typed, so that the printed arguments and the checkpoint show what really ran.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_vwn.config import VirtualWidthError


@dataclass(frozen=True)
class MachineFlag:
    """One flag, its value if it takes one, and why this machine needs it."""

    flag: str
    value: str | None
    reason: str

    @property
    def text(self) -> str:
        """As typed on a command line."""
        return self.flag if self.value is None else f"{self.flag} {self.value}"


_NO_GPU = "there is no GPU"
_NO_TE = "Transformer Engine is not installed"
_NO_APEX = "Apex is not installed"


def needed_flags(*, gpu: bool, transformer_engine: bool) -> list[MachineFlag]:
    """The flags for this machine.

    Args:
        gpu: whether a CUDA device is present.
        transformer_engine: whether Transformer Engine can be imported; without a GPU it cannot run and is not used.
    """
    needed = []
    if not gpu:
        needed += [
            MachineFlag("--distributed-backend", "gloo", _NO_GPU),
            MachineFlag("--use-cpu-initialization", None, _NO_GPU),
            # With worker processes a thread of the data loader pins memory, and only the main thread's GPU is emulated.
            MachineFlag("--num-workers", "0", _NO_GPU),
        ]
    if not gpu or not transformer_engine:
        reason = _NO_TE if not transformer_engine else _NO_GPU
        needed += [
            MachineFlag("--transformer-impl", "local", reason),
            MachineFlag("--no-persist-layer-norm", None, reason),
            MachineFlag("--no-rope-fusion", None, reason),
        ]
        # Apex brings this kernel; with a GPU and Apex the local layers may use it.
        if not gpu or find_spec("scaled_masked_softmax_cuda") is None:
            needed.append(MachineFlag("--no-masked-softmax-fusion", None, _NO_APEX if gpu else _NO_GPU))
    # The head is Megatron's own linear layer, which needs Apex's kernel beside Transformer Engine's layers, too.
    if not gpu or find_spec("fused_weight_gradient_mlp_cuda") is None:
        needed.append(MachineFlag("--no-gradient-accumulation-fusion", None, _NO_APEX if gpu else _NO_GPU))
    return needed


def complete_command_line(argv: Sequence[str], needed: Sequence[MachineFlag]) -> tuple[list[str], list[MachineFlag]]:
    """Append the needed flags that are not there yet.

    Returns:
        The completed command line and the flags that were added.

    Raises:
        VirtualWidthError: the user typed another value for a flag that this machine needs.
    """
    argv, added = list(argv), []
    for need in needed:
        typed = _typed_values(argv, need.flag)
        if not typed:
            argv += need.text.split()
            added.append(need)
        elif need.value is not None and typed[-1] != need.value:
            raise VirtualWidthError(
                f"{need.flag} {typed[-1]} cannot run here because {need.reason}: drop the flag or give {need.text}."
            )
    return argv, added


def describe(added: Sequence[MachineFlag]) -> str:
    """One line that says which flags were added and why, grouped by reason."""
    reasons = dict.fromkeys(need.reason for need in added)
    parts = [f"{' '.join(need.text for need in added if need.reason == reason)} ({reason})" for reason in reasons]
    return f"added to the command line: {'; '.join(parts)}"


def local_layers_cost(args: argparse.Namespace, *, gpu: bool) -> str | None:
    """What it costs to train with Megatron's local layers on a GPU, as a sentence; None where that is not done.

    Args:
        args: Megatron's arguments, validated.
        gpu: whether a GPU is present (not an emulated one).
    """
    if not gpu or args.transformer_impl != "local":
        return None
    heads = args.num_attention_heads / args.tensor_model_parallel_size
    scores = heads * args.micro_batch_size * args.seq_length**2 * (2 if args.bf16 or args.fp16 else 4)
    return (
        "Megatron's local layers compute on this GPU instead of Transformer Engine's: attention holds all scores of a "
        f"sublayer ({scores / 1e9:.2g} GB, more than once) instead of none, norms and activations are not fused, and "
        "there is no FP8"
    )


def _typed_values(argv: Sequence[str], flag: str) -> list[str]:
    """Values typed for ``flag``, as ``--flag value`` or ``--flag=value``; "" where it has none."""
    values = []
    for position, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name == flag:
            following = argv[position + 1] if position + 1 < len(argv) else ""
            values.append(value if equals else following)
    return values

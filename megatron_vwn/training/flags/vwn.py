"""The ``--vwn-*`` flags beside Megatron's own, and their way into a ``VirtualWidthConfig``.

Every flag defaults to None ("not given") so that ``VirtualWidthConfig`` stays the only place with defaults and choices,
and so that a flag without a virtual width to act on can be refused instead of ignored.
"""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import get_args

from megatron_vwn.config import (
    Carry,
    Connection,
    Embedding,
    Gate,
    Kernels,
    Linear,
    Partition,
    VirtualWidthConfig,
    VirtualWidthError,
)
from megatron_vwn.training.refusals.versions import ALLOW_UNTESTED

_PRESETS = ("vwn", "hyper-connections", "frac-connections")
_FIELDS = tuple(field.name for field in fields(VirtualWidthConfig))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--vwn-*`` group to Megatron's parser; the form that Megatron calls an ``extra_args_provider``.

    A parser error (an unknown flag, a letter where a number belongs) is raised as a ``VirtualWidthError`` rather than
    answered with the several hundred lines of usage that every rank would print.
    """
    parser.error = _refuse
    parser.add_argument(
        ALLOW_UNTESTED,
        action="store_true",
        help="Train with a megatron-core, or with flags of it, that nobody has tried with a virtual width; the run "
        "says which these are.",
    )
    group = parser.add_argument_group(
        "virtual width",
        "Give --vwn-m and --vwn-n for a virtual width network; neither trains the ordinary HybridModel.",
    )
    group.add_argument(
        "--vwn-m", type=int, metavar="M", help="Segments that one backbone vector of --hidden-size is cut into."
    )
    group.add_argument(
        "--vwn-n", type=int, metavar="N", help="Segments of the residual stream, N >= M; it is N/M times the backbone."
    )
    group.add_argument(
        "--vwn-preset",
        metavar=f"{{{','.join(_PRESETS)}}}",
        help="The special cases that have names of their own: hyper-connections is M = 1 (give --vwn-n), "
        "frac-connections is N = M (give --vwn-m), vwn is any.",
    )
    _add_choice(group, "connection", Connection, "Coefficients per token (DGHC) or learned constants (GHC).")
    _add_choice(
        group, "gate", Gate, "How dynamic coefficients are squashed: additive tanh or multiplicative 2 sigmoid."
    )
    _add_choice(group, "carry", Carry, "Whether segments mix on their way past a sublayer or pass unchanged.")
    _add_choice(
        group,
        "embedding",
        Embedding,
        "A table of the full width, an ordinary table and a learned expansion, or an ordinary table and copies.",
        default="projected if N > 2M, else wide",
    )
    group.add_argument(
        "--vwn-reduce-norm",
        action=argparse.BooleanOptionalAction,
        help="Group RMS norm in groups of --hidden-size before the stream is reduced for the head "
        "(default: on if N > 2M and N is a multiple of M, else off).",
    )
    _add_choice(
        group,
        "linear",
        Linear,
        "Whether the learned deviations of W_expand and W_reduce are divided by the square root of what they sum over, "
        "or are the paper's plain matrices.",
    )
    group.add_argument(
        "--vwn-ngrams",
        type=_whole_numbers,
        metavar="LENGTH,...",
        help="Lengths of n-grams of tokens, such as 2,3, whose hashed embeddings are added to the over-width "
        "embedding; they do not reach across documents (default: none).",
    )
    group.add_argument(
        "--vwn-ngram-vocab",
        type=int,
        metavar="ROWS",
        help="Rows of the table of each n-gram length, each as wide as the stream.",
    )
    _add_choice(
        group,
        "partition",
        Partition,
        "How tensor-parallel ranks share the stream: by token, by channel of every segment, or not at all; "
        "may change when a run resumes.",
        default="sequence with --sequence-parallel, else width",
    )
    _add_choice(
        group,
        "kernels",
        Kernels,
        "What reads and writes the stream: fused Triton kernels, torch, or the kernels wherever they can run.",
    )
    group.add_argument(
        "--vwn-recompute-block",
        type=int,
        metavar="K",
        help="Keep the over-width state of one in K sublayers for the backward pass, and rebuild the others from it "
        "and the sublayers' outputs, exactly; the square root of a stage's sublayers needs least memory; may change "
        "when a run resumes (default: keep them all).",
    )
    group.add_argument(
        "--vwn-log-interval",
        type=int,
        metavar="K",
        help="Every K steps write how the connections route, how many segments carry the stream, how far back "
        "sublayers read and what gradients arrive, to --tensorboard-dir or --wandb-project (default: never).",
    )
    return parser


def virtual_width_from_args(args: argparse.Namespace) -> VirtualWidthConfig | None:
    """The virtual width that parsed flags ask for; None for the ordinary model.

    Also reads the arguments that a checkpoint was saved with; one without any ``vwn_*`` attribute is an ordinary model.

    Raises:
        VirtualWidthError: only one of m and n, another ``--vwn-*`` flag without them, or values no model can have.
    """
    given = {name: value for name in _FIELDS if (value := getattr(args, f"vwn_{name}", None)) is not None}
    preset = getattr(args, "vwn_preset", None)
    if not given and preset is None:
        return None
    _apply_preset(preset, given)
    missing = [name for name in ("m", "n") if name not in given]
    if missing:
        said = [*given, *(["preset"] if preset else [])]
        raise VirtualWidthError(
            f"{_flags(said)} {'says' if len(said) == 1 else 'say'} nothing without {_flags(missing)}: "
            f"add {_flags(missing)}, or drop {_flags(said)} to train the ordinary model."
        )
    return VirtualWidthConfig(**given)


def record_virtual_width(args: argparse.Namespace, virtual_width: VirtualWidthConfig) -> None:
    """Write the resolved defaults back into ``args``.

    Megatron prints ``args`` and saves them with every checkpoint, so both state what was trained even if a later
    version of this package chooses other defaults.
    """
    for name in _FIELDS:
        setattr(args, f"vwn_{name}", getattr(virtual_width, name))


def flag(name: str) -> str:
    """The command-line flag of a ``VirtualWidthConfig`` field."""
    return f"--vwn-{name.replace('_', '-')}"


def typed(name: str, value: str | int | bool | tuple[int, ...] | None) -> str:
    """A field of ``VirtualWidthConfig`` as it is typed on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else flag(name).replace("--", "--no-", 1)
    if value in (None, ()):
        return f"no {flag(name)}"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"{flag(name)} {value}"


def _apply_preset(preset: str | None, given: dict[str, object]) -> None:
    """Fill in what a preset means, in place."""
    if preset is None:
        return
    if preset not in _PRESETS:
        raise VirtualWidthError(f"--vwn-preset is {preset!r}: choose one of {', '.join(_PRESETS)}.")
    if preset == "hyper-connections" and given.setdefault("m", 1) != 1:
        raise VirtualWidthError(f"--vwn-preset hyper-connections means --vwn-m 1, not {given['m']}: drop --vwn-m.")
    if preset == "frac-connections" and "m" in given and given.setdefault("n", given["m"]) != given["m"]:
        raise VirtualWidthError(
            f"--vwn-preset frac-connections means --vwn-n equal to --vwn-m {given['m']}, not {given['n']}: "
            "drop --vwn-n."
        )


def _flags(names: Iterable[str]) -> str:
    return " and ".join(flag(name) for name in names)


def _add_choice(group, name: str, choices, description: str, default: str | None = None) -> None:
    """Add a flag with named choices; ``VirtualWidthConfig`` checks them, so that its sentence is the one printed."""
    default = default or getattr(VirtualWidthConfig, name)
    metavar = f"{{{','.join(get_args(choices))}}}"
    group.add_argument(flag(name), metavar=metavar, help=f"{description} (default: {default}).")


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 2,3") from None


def _refuse(message: str) -> None:
    raise VirtualWidthError(f"{message}: see --help for the flags.")

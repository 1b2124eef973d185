"""Flags that are not in the support matrix: a later Megatron has more of them, and each may change what is computed.

``known_flags.txt`` has every flag of the parser that the matrix was made for, one a line, because patterns of the
matrix such as ``--moe-*`` would take in a new one unseen.
"""

import argparse
from functools import cache
from pathlib import Path

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.flags.defaults import megatron_defaults, megatron_flags
from megatron_vwn.training.refusals.versions import ALLOW_UNTESTED, untested_megatron


def refuse_unknown(args: argparse.Namespace) -> None:
    """Refuse a flag of Megatron that nobody has tried, unless --allow-untested is given.

    Args:
        args: parsed flags, before Megatron's ``validate_args``.

    Raises:
        VirtualWidthError: an unknown flag has not its default.
    """
    unknown = unknown_flags(args)
    if unknown and not args.allow_untested:
        raise VirtualWidthError(
            f"not in the support matrix, so that nobody knows what becomes of a virtual width: {' '.join(unknown)}; "
            f"drop what stands there, or give {ALLOW_UNTESTED}."
        )


def describe_untested(args: argparse.Namespace) -> str:
    """What --allow-untested lets through."""
    let_through = filter(None, (untested_megatron(), *unknown_flags(args)))
    return f"{ALLOW_UNTESTED} lets through: {', '.join(let_through) or 'nothing here'}"


def unknown_flags(args: argparse.Namespace) -> list[str]:
    """Flags of the installed Megatron that the support matrix does not know and that have not their default."""
    defaults = megatron_defaults()
    return [
        spellings[0]
        for name, spellings in megatron_flags()
        if not known_flags() & set(spellings)
        and name in defaults
        and getattr(args, name, defaults[name]) != defaults[name]
    ]


@cache
def known_flags() -> frozenset[str]:
    """Every flag that the support matrix was made for, in all spellings."""
    return frozenset(Path(__file__).with_name("known_flags.txt").read_text().split())

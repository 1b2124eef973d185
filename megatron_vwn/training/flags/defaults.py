"""Megatron's parser, and its arguments when nothing is typed."""

import argparse
import os
from functools import cache

from megatron.training.arguments import add_megatron_arguments


def megatron_parser() -> argparse.ArgumentParser:
    """A new parser of all of Megatron's flags and no other."""
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))


@cache
def megatron_flags() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Every argument of Megatron's parser with the spellings of its flag, once: a parser takes a tenth of a second."""
    return tuple((action.dest, tuple(action.option_strings)) for action in megatron_parser()._actions)


def megatron_defaults() -> dict[str, object]:
    """What Megatron's parser gives to every argument that is not typed, before validation derives further ones."""
    return _of_world(os.environ.get("WORLD_SIZE"))


@cache
def _of_world(world_size: str | None) -> dict[str, object]:
    """One of them is the environment's world size."""
    return vars(megatron_parser().parse_args([]))

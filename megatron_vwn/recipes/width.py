"""The virtual width that flags of a recipe or of a study ask for, by the training program's own parser and rules.

Nothing here imports torch or Megatron.
"""

from argparse import ArgumentParser
from collections.abc import Mapping
from functools import cache

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.recipes.flags import Value, typed
from megatron_vwn.training.flags.vwn import add_arguments, virtual_width_from_args

PREFIXES = ("vwn-", "no-vwn-")


def virtual_width_of(flags: Mapping[str, Value]) -> VirtualWidthConfig | None:
    """The virtual width among flags without their dashes; None for the ordinary model.

    A ``--vwn-*`` flag that nobody knows is left to ``check_flags``.

    Raises:
        VirtualWidthError: the training program's sentence about values that no model can have.
    """
    words = (word for key, value in flags.items() if key.startswith(PREFIXES) for word in typed(key, value))
    return _parsed(tuple(words))


def check_virtual_width(flags: Mapping[str, Value]) -> None:
    """Refuse a virtual width that the model or the layout among the flags cannot carry.

    Raises:
        VirtualWidthError: as ``virtual_width_of``, and those of ``VirtualWidthConfig.check_model`` and
            ``check_parallel``.
    """
    width, hidden = virtual_width_of(flags), flags.get("hidden-size")
    if width is None or type(hidden) is not int:  # which Megatron refuses
        return
    tensor = flags.get("tensor-model-parallel-size") or 1
    width.check_model(hidden_size=hidden, tied_embeddings=not flags.get("untie-embeddings-and-output-weights"))
    if type(tensor) is int:
        parallel = bool(flags.get("sequence-parallel"))
        width.check_parallel(hidden_size=hidden, tensor_parallel_size=tensor, sequence_parallel=parallel)


@cache
def _parsed(words: tuple[str, ...]) -> VirtualWidthConfig | None:
    """A planner asks for the same width thousands of times."""
    return virtual_width_from_args(add_arguments(ArgumentParser(allow_abbrev=False)).parse_known_args(words)[0])

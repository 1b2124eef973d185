"""Megatron's arguments of a model as they are typed, to train a converted checkpoint on by copying a line."""

import argparse
from collections.abc import Mapping

from megatron.training.arguments import add_megatron_arguments

from megatron_vwn.training.flags.vwn import add_arguments

# Derived by Megatron from the pattern, which refuses to be told again.
_SAID_BY_THE_PATTERN = ("num_layers", "mtp_num_layers")


def command_line(arguments: Mapping[str, object]) -> list[str]:
    """The flags that make Megatron's parser return these arguments: what differs from its defaults, and no more.

    Args:
        arguments: values by the names of parsed arguments, such as ``megatron_arguments`` gives; without
            ``--group-query-attention`` and biases, what Megatron derives from their absence is left out.
    """
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    wanted = {name: value for name, value in arguments.items() if name not in _SAID_BY_THE_PATTERN}
    if not wanted.get("group_query_attention"):
        wanted.pop("num_query_groups", None)
    if wanted.get("swiglu") or wanted.get("squared_relu") or not wanted.get("add_bias_linear", True):
        wanted.pop("bias_gelu_fusion", None)
    words, said = [], set()
    for action in parser._actions:
        name = action.dest
        if name in said or name not in wanted or wanted[name] in (action.default, None, ()):
            continue
        said.add(name)
        words += _typed(action, wanted[name])
    return words


def _typed(action: argparse.Action, value: object) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if value else next(each for each in action.option_strings if each.startswith("--no-"))]
    if action.nargs == 0:  # a switch, whose presence sets the other value than its default
        return [flag]
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [flag, *map(str, value)]
    if isinstance(value, list):
        return [flag, f"[{','.join(map(str, value))}]"]  # Megatron evaluates it as an expression
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]

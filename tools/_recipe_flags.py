"""Keys of recipes and flags of the training program: overrides as they are typed, and back to a command line."""

import difflib
import json
import subprocess
import sys
from collections.abc import Sequence

import yaml

from megatron_vwn.config import VirtualWidthError

# Of a recipe, in the order in which their flags are written.
SECTIONS = ("model", "virtual_width", "layout", "optimizer", "data", "run", "resilience", "gpu")
Value = str | int | float | bool | list | None


def typed(key: str, value: Value) -> list[str]:
    """A key and its value as words of a command line; none for null and false."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    text = str(value)
    return [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]


def parse_overrides(words: Sequence[str], flags: Sequence[str] = ()) -> dict[str, Value]:
    """Overrides as they are typed.

    Args:
        words: ``key=value``; the value is read as YAML (true, false, null, numbers, [1, 2]), the key may be written
            with underscores and with its section in front (layout.nodes=2).
        flags: flags of the training program as on its command line: ``--key value``, ``--key=value``, ``--key``.

    Raises:
        VirtualWidthError: a word that is neither.
    """
    values: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise VirtualWidthError(
                f"{word!r} is no override: write key=value, and flags of the training program after --."
            )
        values[_plain(key)] = _value(text, word)
    key = None
    for word in flags:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            values[_plain(key)] = _value(text, word) if equals else True
        elif key is None:
            raise VirtualWidthError(f"{word!r} stands after -- without a flag: write --key value.")
        elif values[_plain(key)] is True:
            values[_plain(key)] = _value(word, word)
        else:
            before = values[_plain(key)]
            values[_plain(key)] = [*(before if isinstance(before, list) else [before]), _value(word, word)]
    return values


def _plain(key: str) -> str:
    section, dot, rest = key.partition(".")
    return (rest if dot and section in SECTIONS else key).replace("_", "-")


def _value(text: str, word: str) -> Value:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, dict):
        raise VirtualWidthError(f"{word!r} has a value that is neither a number, a word nor a list: correct it.")
    # What YAML takes for something else than a number (dates, say) is meant as typed.
    return value if isinstance(value, Value) else text


def check_flags(arguments: Sequence[str]) -> None:
    """Let Megatron's parser, with the ``--vwn-*`` flags, look at names and values; in a process of its own.

    Does nothing where Megatron is not installed, as on a login node; every rank would refuse the same flags.

    Raises:
        VirtualWidthError: an unknown flag or a value of the wrong kind.
    """
    program = [sys.executable, "-W", "ignore", "-c", _CHECK]
    done = subprocess.run(program, input=json.dumps(list(arguments)), capture_output=True, text=True)
    if done.returncode:
        return
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["refusal"] is None:
        return
    words = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [word for word in words if word not in answer["flags"]]
    if not unknown:
        raise VirtualWidthError(answer["refusal"])
    near = difflib.get_close_matches(unknown[0], answer["flags"], n=1)
    advice = f"did you mean {near[0][2:]}?" if near else "see --help of megatron_vwn.training.pretrain."
    raise VirtualWidthError(f"there is no flag or key {unknown[0][2:]}: {advice}")


_CHECK = """
import argparse, json, sys
from megatron_vwn import cpu
cpu.install(announce=False)
from megatron.training.arguments import add_megatron_arguments
from megatron_vwn.training.arguments import add_arguments
parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
try:
    parser.parse_args(json.load(sys.stdin))
    refusal = None
except ValueError as error:
    refusal = str(error)
flags = [flag for action in parser._actions for flag in action.option_strings]
print(json.dumps({"refusal": refusal, "flags": flags}))
"""

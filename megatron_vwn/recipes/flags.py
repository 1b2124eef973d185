"""Keys of recipes and flags of the training program: overrides as they are typed, and back to a command line."""

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import ClassVar

import yaml

from megatron_vwn.config import VirtualWidthError

# Of a recipe, in the order in which their flags are written.
SECTIONS = ("model", "virtual_width", "layout", "optimizer", "data", "run", "resilience", "gpu")
Value = str | int | float | bool | list | None
# Digits of a whole number that a flag may have; Python refuses to read one of thousands.
_LONGEST_NUMBER = 30


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


class EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping; of several the library would take the last one in silence."""

    def compose_mapping_node(self, anchor):
        """As the library does; in the text keys stand once, before a merge (<<) adds others."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands in line {lines[key.value]} and again in line {line}"
                )
            lines[str(key.value)] = line
        return node


class _AsWritten(EachKeyOnce):
    """YAML in which true, false, null and whole numbers are what they say, and all else is the text that was written.

    By YAML 1.1, as the library reads it, 010 would be 8, 1:30 90, on true, and 1e-3 a word but 1.0e-3 a number.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}


_AsWritten.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tfTF")
)
_AsWritten.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(null|Null|NULL|~|)$"), ["n", "N", "~", ""])
_AsWritten.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("-?[1-9][0-9]*$|0$"), list("-0123456789"))
_AsWritten.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def read_yaml(text: str) -> object:
    """The content of a YAML document, numbers with a fraction or an exponent as text.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _AsWritten)  # a safe loader


def read_yaml_file(path: Path, read: Callable[[str], object] = read_yaml) -> dict[str, object]:
    """The content of a file whose keys are names.

    Args:
        path: the file.
        read: what makes values of its text.

    Raises:
        VirtualWidthError: it cannot be read, is no YAML, or no keys with values.
    """
    try:
        content = read(path.read_text(encoding="utf-8"))
    except Exception as error:  # what the library's constructors raise of a value is no YAMLError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VirtualWidthError(f"{path} cannot be read as YAML ({reason}): correct it.") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise VirtualWidthError(f"{path} is no list of keys with values: correct it.")
    return content


def parse_overrides(
    words: Sequence[str], flags: Sequence[str] = (), launchers: Collection[str] = ()
) -> dict[str, Value]:
    """Overrides as they are typed.

    Args:
        words: ``key=value``; true, false, null, whole numbers and lists such as [1, 2] are taken for that, all else is
            passed on as it is; the key may be written with underscores and with its section in front (layout.nodes=2).
        flags: flags of the training program as on its command line: ``--key value``, ``--key=value``, ``--key``; they
            are passed on as they are.
        launchers: keys that are no flags.

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
    key, given = None, []
    for word in flags:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if key in launchers:
                raise VirtualWidthError(f"--{key} is no flag of the training program: write {key}=... before --.")
            given = [text] if equals else []
            values[key] = _number(text) if equals else True
            key = None if equals else key
        elif key is None:
            raise VirtualWidthError(f"{word!r} stands after -- without a flag: write --key value.")
        else:
            given.append(word)
            values[key] = _number(word) if len(given) == 1 else given.copy()
    return values


def _plain(key: str) -> str:
    section, dot, rest = key.partition(".")
    return (rest if dot and section in SECTIONS else key).replace("_", "-")


def _value(text: str, word: str) -> Value:
    if not text:
        raise VirtualWidthError(f"{word!r} has no value: write {word}null to leave it out.")
    if text.startswith("["):
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            value = None
        if not isinstance(value, list):
            raise VirtualWidthError(f"{word!r} has a list that does not end: write it as [1, 2].")
        return value
    words = {"true": True, "false": False, "null": None}
    return words[text.lower()] if text.lower() in words else _number(text)


def _number(text: str) -> int | str:
    """A whole number in its usual form, so that it is written again as it was typed; anything else as it is."""
    whole = len(text) <= _LONGEST_NUMBER and text.removeprefix("-").isdecimal()
    return int(text) if whole and str(int(text)) == text else text


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
from megatron_vwn.training.flags.vwn import add_arguments
parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
try:
    parser.parse_args(json.load(sys.stdin))
    refusal = None
except ValueError as error:
    refusal = str(error)
flags = [flag for action in parser._actions for flag in action.option_strings]
print(json.dumps({"refusal": refusal, "flags": flags}))
"""

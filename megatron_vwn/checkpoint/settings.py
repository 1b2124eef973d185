"""Whether JSON files beside weights say what they may say: each value of its kind, and in its range.

Looked at before anything is made of them: what a wrong value would provoke later is no reason that a reader could use.
"""

import argparse
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
    "intermediate_size",
    "norm_eps",
    "moe_intermediate_size",
    "moe_router_topk_scaling_factor",
    "vwn_m",
    "vwn_n",
    "vwn_ngrams",
    "vwn_ngram_vocab",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "vwn_document_end")
# What other models call a field of ours, which would be left at its default.
_CALLED_OTHERWISE = {"rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps"}
_LARGEST = 2**31
_ROPE = {"rope_theta": float, "partial_rotary_factor": float, "rope_type": str}


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        VirtualWidthError: it cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VirtualWidthError(f"{path} cannot be read ({error.strerror}): give another.") from error
    except (ValueError, RecursionError) as error:
        raise VirtualWidthError(f"{path} is no JSON: it is damaged, give another.") from error
    if not isinstance(found, dict):
        raise VirtualWidthError(f"{path} holds no JSON object: it is damaged, give another.")
    return found


def check_config(settings: Mapping[str, object], where: object) -> None:
    """Refuse fields of a VWNConfig that have a value of another kind, or one that no model can have.

    Args:
        settings: by the names of the fields; others are let through.
        where: they come from, for the sentence.

    Raises:
        VirtualWidthError: names the field and its value.
    """
    for name, ours in _CALLED_OTHERWISE.items():
        if name in settings:
            raise VirtualWidthError(f"{where} has {name}, which this model calls {ours}: rename it.")
    for name, kind in inspect.get_annotations(VWNConfig, eval_str=True).items():
        value = settings.get(name)
        # None is what a field has that is not given.
        if value is not None and not _fits(value, kind):
            raise VirtualWidthError(f"{where} has {name} = {_shown(value)}, which is no {_named(kind)}: correct it.")
        for number in _each(value):
            without = name == "pad_token_id" and number == -1  # as some old models say that they have none
            if isinstance(number, bool) or not isinstance(number, (int, float)) or without:
                continue
            if number < 0 or number >= _LARGEST or (number == 0 and name in _POSITIVE):
                raise VirtualWidthError(f"{where} has {name} = {_shown(value)}, which no model can have: correct it.")
    for name, kind in _ROPE.items():
        value = (settings.get("rope_parameters") or {}).get(name)
        if value is not None and (not _fits(value, kind) or (kind is float and value <= 0)):
            raise VirtualWidthError(f"{where} has {name} = {_shown(value)}, which no model can have: correct it.")
    vocabulary = settings.get("vocab_size") or VWNConfig.vocab_size
    for name in _TOKENS:
        value = settings.get(name)
        for token in _each(value):
            if token is not None and token >= vocabulary:
                raise VirtualWidthError(f"{where} has {name} = {_shown(value)} and {vocabulary} tokens: correct it.")
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise VirtualWidthError(f"{where} has dtype = {_shown(dtype)}, which torch does not have: correct it.")


def check_arguments(saved: Mapping[str, object], parser: argparse.ArgumentParser, where: object) -> None:
    """Refuse arguments that Megatron's parser could not have returned.

    Args:
        saved: values by name; names that the parser does not know are let through.
        parser: Megatron's.
        where: they come from, for the sentence.

    Raises:
        VirtualWidthError: names the argument and its value.
    """
    for action in parser._actions:
        value = saved.get(action.dest)
        if value is None:
            continue
        # Validation makes one value of a list of one, and lists of expressions.
        if not all(_can_be(action, each) for each in _each(value)):
            raise VirtualWidthError(
                f"{where} has {action.dest} = {_shown(value)}, which Megatron's {action.option_strings[0]} cannot be: "
                "correct it, or remove the file, and Megatron's defaults are taken."
            )


def _can_be(action: argparse.Action, value: object) -> bool:
    if action.choices is not None:
        return value in action.choices
    if action.nargs == 0:
        return isinstance(value, bool) or (type(value) is type(action.const) and value == action.const)
    if action.type in (int, float):
        return _fits(value, action.type)
    return action.type not in (str, None) or isinstance(value, str)


def _each(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else [value]


def _fits(value: object, kind: object) -> bool:
    """Whether a value that JSON or a parser gave is of an annotated kind."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(each, parts[0]) for each in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(value, bool):
        return kind in (bool, Any)
    return kind is Any or isinstance(value, origin or kind)


def _named(kind: object) -> str:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return " or ".join(getattr(each, "__name__", str(each)) for each in kinds if each is not NoneType)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

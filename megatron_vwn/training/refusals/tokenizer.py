"""The tokenizer of a run, which Megatron builds; what it stumbles over becomes one sentence."""

import argparse
import json
from pathlib import Path

from megatron.training.global_vars import rebuild_tokenizer

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.tokenizer import one_line


def build_tokenizer(args: argparse.Namespace) -> None:
    """Have Megatron build the tokenizer and set it as its global variable.

    Args:
        args: Megatron's flags, validated.

    Raises:
        VirtualWidthError: when it cannot be built.
    """
    try:
        rebuild_tokenizer(args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exception
        path = args.tokenizer_model
        if not args.trust_remote_code and _has_code(path):
            raise VirtualWidthError(
                f"--tokenizer-model {path} names code of its own, which is not run: give a folder without auto_map in "
                "its tokenizer_config.json, or --trust-remote-code if you trust that code."
            ) from error
        reason = one_line(str(error).rpartition(" Exception: ")[2] or error)
        raise VirtualWidthError(
            f"--tokenizer-type {args.tokenizer_type} cannot load --tokenizer-model {path} ({reason}): give another."
        ) from error


def _has_code(folder: str | None) -> bool:
    try:
        return "auto_map" in json.loads((Path(folder) / "tokenizer_config.json").read_text())
    except (OSError, TypeError, ValueError, RecursionError):
        return False

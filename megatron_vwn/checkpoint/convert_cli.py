"""vwn-convert: Megatron checkpoints to Hugging Face and back.

vwn-convert to-hf   MEGATRON FOLDER [--tokenizer DIR] [--verify]
vwn-convert from-hf FOLDER MEGATRON [--verify]
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vwn.cli import DIFFERENT, FAILED, die_with_parent, exit_code, progress_bar
from megatron_vwn.config import VirtualWidthError

if TYPE_CHECKING:
    from megatron_vwn.checkpoint.torch_dist import TorchDistReader


class _Difference(Exception):
    """What --verify found."""


def main(argv: list[str] | None = None) -> int:
    """Run one conversion; returns the exit code."""
    options = _parser().parse_args(argv)
    program = _to_hf if options.command == "to-hf" else _from_hf
    quiet_imports()
    try:
        return exit_code("vwn-convert", lambda: program(options))
    except _Difference as difference:
        print(f"vwn-convert: {difference}", file=sys.stderr)
        return FAILED


def quiet_imports() -> None:
    """Keep Megatron from warning of a missing Apex and a single process, which concern training, not a conversion."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.|torch\.distributed\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _to_hf(options: argparse.Namespace) -> None:
    # Imported when the command line is known: torch and Megatron take seconds.
    from megatron_vwn.checkpoint.convert import to_hf
    from megatron_vwn.checkpoint.torch_dist import TorchDistReader
    from megatron_vwn.checkpoint.vocabulary import TOKENS

    source = TorchDistReader(options.source)
    tokenizer = options.tokenizer or _tokenizer_of(source)
    with _appearing(options, options.source, tokenizer) as folder:
        config = to_hf(
            source,
            folder,
            tokenizer=tokenizer,
            name=options.target.resolve().name,
            shard_bytes=options.shard_mebibytes * 2**20,
            progress=progress_bar,
        )
        if options.verify:
            _verify(options.source, folder)
    print(f"{options.target}: {config.hybrid_pattern}, {len(source.tensors)} tensors of Megatron", end="")
    print(f", tokenizer of {tokenizer}." if tokenizer else "; no tokenizer: give one with --tokenizer.")
    if getattr(source.arguments, TOKENS, None) is None:
        print(
            f"The checkpoint does not say how many of its {config.vocab_size} rows of vocabulary are tokens, so all "
            "are exported, any that pad it too: train on with this version, which saves it, to leave them out."
        )


def _from_hf(options: argparse.Namespace) -> None:
    from megatron_vwn.checkpoint.arguments import command_line
    from megatron_vwn.checkpoint.convert import from_hf
    from megatron_vwn.checkpoint.folders import SafetensorsReader

    source = SafetensorsReader(options.source)
    engine = None if options.transformer_impl is None else options.transformer_impl == "transformer_engine"
    with _appearing(options, options.source) as folder:
        arguments = from_hf(source, folder, transformer_engine=engine, progress=progress_bar)
        if options.verify:
            _verify(folder, options.source)
    print(f"{options.target}: weights without optimizer; train on with these and your training flags:")
    print("   ", shlex.join(["--load", str(options.target), *command_line(arguments)]))


def _appearing(options: argparse.Namespace, *sources: Path | None):
    from megatron_vwn.checkpoint.folders import appearing_whole

    return appearing_whole(options.target, overwrite=options.overwrite, sources=sources)


def _verify(megatron: Path, hugging_face: Path) -> None:
    """In a process of its own, which may emulate a GPU and ends with all its memory."""
    print("vwn-convert: running both models to compare their logits.", file=sys.stderr, flush=True)
    program = [sys.executable, "-W", "ignore", "-m", "megatron_vwn.checkpoint.verify"]
    # Ctrl-C reaches this process alone, which then ends the other.
    end = partial(die_with_parent, signal.SIGTERM, os.getpid())
    code = subprocess.run([*program, megatron, hugging_face], process_group=0, preexec_fn=end).returncode
    if code == DIFFERENT:
        raise _Difference("the two checkpoints do not compute the same: nothing was written.")
    if code:
        raise VirtualWidthError("--verify could not run both checkpoints: nothing was written, try without it.")


def _tokenizer_of(source: TorchDistReader) -> Path | None:
    """The tokenizer that the run used, if it is of Hugging Face and still there."""
    path = getattr(source.arguments, "tokenizer_model", None)
    return Path(path) if path and (Path(path) / "tokenizer_config.json").exists() else None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vwn-convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{to-hf,from-hf}")
    to = commands.add_parser("to-hf", help="write a Megatron checkpoint as a Hugging Face folder")
    to.add_argument("source", type=Path, metavar="MEGATRON", help="what --save named, or one checkpoint in it")
    to.add_argument("target", type=Path, metavar="FOLDER", help="the folder to write")
    to.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer to copy (default: the run's)")
    to.add_argument("--shard-mebibytes", type=_positive, default=512, help="size of the files (default: %(default)s)")
    back = commands.add_parser("from-hf", help="write a Hugging Face folder as a checkpoint that --load takes")
    back.add_argument("source", type=Path, metavar="FOLDER", help="a folder with a VWN model")
    back.add_argument("target", type=Path, metavar="MEGATRON", help="the folder to write, for --load")
    back.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="name tensors for this backend (default: the one of the run that the folder was converted from, or what a "
        "training here chooses)",
    )
    for command in (to, back):
        command.add_argument("--verify", action="store_true", help="run both on the same prompts, compare their logits")
        command.add_argument("--overwrite", action="store_true", help="replace what stands there")
    return parser


if __name__ == "__main__":
    sys.exit(main())

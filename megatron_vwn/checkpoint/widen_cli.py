"""vwn-widen: give a trained ordinary model a virtual width; it computes the same function and trains on.

    vwn-widen SOURCE MEGATRON --vwn-m M --vwn-n N [--vwn-...]

SOURCE is a Megatron HybridModel checkpoint or a Hugging Face folder of Llama, Qwen3 or Qwen3-MoE.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from megatron_vwn.checkpoint.convert_cli import quiet_imports
from megatron_vwn.cli import exit_code, progress_bar
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.flags.vwn import add_arguments, virtual_width_from_args


def main(argv: list[str] | None = None) -> int:
    """Widen one model; returns the exit code."""
    return exit_code("vwn-widen", lambda: _widen(_parser().parse_args(argv)))


def _widen(options: argparse.Namespace) -> None:
    if options.vwn_reduce_norm:
        raise VirtualWidthError("--vwn-reduce-norm would change the function: leave it out.")
    virtual_width = virtual_width_from_args(options)
    if virtual_width is None:
        raise VirtualWidthError("no virtual width was given: add --vwn-m and --vwn-n.")
    virtual_width = replace(virtual_width, reduce_norm=False)
    quiet_imports()

    # Imported when the command line is known: torch and Megatron take seconds.
    import torch

    from megatron_vwn.checkpoint.arguments import backend_here, command_line, megatron_arguments
    from megatron_vwn.checkpoint.convert import write_megatron
    from megatron_vwn.checkpoint.folders import SafetensorsReader, appearing_whole
    from megatron_vwn.checkpoint.torch_dist import TorchDistReader
    from megatron_vwn.checkpoint.vocabulary import TOKENS, padded_size
    from megatron_vwn.checkpoint.widen import from_hugging_face, from_megatron, widen

    if (options.source / "config.json").exists():
        model = from_hugging_face(SafetensorsReader(options.source))
        arguments = {TOKENS: model.settings["vocab_size"]}
    else:
        source = TorchDistReader(options.source)
        model, arguments = from_megatron(source), vars(source.arguments)
    if model.further and options.further_predictions is None:
        raise VirtualWidthError(
            f"{options.source} predicts further tokens with a dense fusion that a virtual width does not have: give "
            "--further-predictions drop, or fresh to keep their layers and begin the fusion anew."
        )
    fresh = bool(model.further) and options.further_predictions == "fresh"
    config, tensors, read = widen(model, virtual_width, fresh_predictions=fresh)
    dtype = tensors["model.embed_tokens.weight"].dtype
    model_arguments = megatron_arguments(config) | {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    model_arguments["padded_vocab_size"] = padded_size(config.vocab_size, arguments.get("padded_vocab_size"))
    arguments = arguments | model_arguments | {"params_dtype": dtype}
    arguments["transformer_impl"] = options.transformer_impl or arguments.get("transformer_impl") or backend_here()
    with appearing_whole(options.target, overwrite=options.overwrite, sources=[options.source]) as folder:
        write_megatron(folder, config, tensors, read, arguments=argparse.Namespace(**arguments), progress=progress_bar)
    further = ""
    if model.further:
        further = "; its further predictions " + ("begin with a new fusion" if fresh else "are gone")
    print(f"{options.target}: the function of {options.source} with r = {float(virtual_width.expansion):g}{further}.")
    print("Train on with these and your training flags; without --padded-vocab-size Megatron pads for its own ranks:")
    words = command_line(model_arguments | {"transformer_impl": arguments["transformer_impl"]})
    print("   ", shlex.join(["--load", str(options.target), *words]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vwn-widen",
        description=__doc__.splitlines()[0],
        epilog="--vwn-reduce-norm is not available: it would change the function.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a Megatron checkpoint or a Hugging Face folder")
    parser.add_argument("target", type=Path, metavar="MEGATRON", help="the folder to write, for --load and vwn-convert")
    parser.add_argument(
        "--further-predictions",
        choices=("drop", "fresh"),
        help="what becomes of multi-token prediction, whose dense fusion cannot be kept",
    )
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="name tensors for this backend (default: that of a Megatron source, or what a training here chooses)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there")
    return add_arguments(parser)


if __name__ == "__main__":
    sys.exit(main())

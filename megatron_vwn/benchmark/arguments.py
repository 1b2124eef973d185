"""The command line of ``vwn-benchmark``; nothing here imports torch."""

import argparse
import re
from pathlib import Path

from megatron_vwn.benchmark import report
from megatron_vwn.benchmark import table as _benchmark_table
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops.costs import OPS

PROGRAM = "vwn-benchmark"
PAIRS = ((2, 3), (1, 4), (4, 16), (1, 8), (4, 32), (8, 64))
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EPILOG = """\
examples
  vwn-benchmark kernels --pairs 4,16 8,64 --hidden-size 2048
  vwn-benchmark --compile-only sm_90
  vwn-benchmark --predict h200 --pairs 4,16 --hidden-size 2048
  vwn-benchmark layer --recipe moe-a3.3b --recompute-block 4 8
  vwn-benchmark model --vwn-m 4 --vwn-n 16 --hidden-size 1024 --hybrid-layer-pattern '*-*-*-*-' ...
  vwn-benchmark tune --pairs 4,32 --minutes 10
  vwn-benchmark table
  vwn-benchmark results results/gpu-hour/results.json

layer and model take Megatron's flags; those they are not given come from --recipe, or are those of a small layer
without a GPU and of one of D = 2048 with one. Results are written as JSON, with hardware, versions and commit.
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence."""

    def error(self, message: str):
        raise VirtualWidthError(f"{message}: see {self.prog} --help.")


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair m,n such as 4,16")
    return int(found[1]), int(found[2])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return minutes


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of all modes; its errors are refusals."""
    parser = _Parser(
        prog=PROGRAM,
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")

    kernels = _mode(modes, "kernels", "single operations against their floor, torch.compile and mHC's kernels")
    _sizes(kernels, [2048, 4096], "8192 on a GPU, 256 on a CPU")
    kernels.add_argument(
        "--ops",
        nargs="+",
        choices=OPS,
        metavar="OP",
        help=f"of {', '.join(OPS)} (default: all; of --predict: write_read)",
    )
    kernels.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    kernels.add_argument(
        "--compile-only",
        metavar="ARCH",
        help="compile the kernels for sm_90 (sm_80, sm_100), which needs no GPU, and print registers and spills",
    )
    kernels.add_argument(
        "--predict",
        nargs="+",
        metavar="GPU",
        help="compile the kernels and predict their times on an h200 or h100 by a model; needs no GPU",
    )
    kernels.add_argument(
        "--for-planner", action="store_true", help="with --predict: make vwn-plan use it for write_read"
    )
    _measuring(kernels, rounds=21)

    for name, what in (("layer", "an ordinary layer and the same with a virtual width"), ("model", "whole models")):
        mode = _mode(modes, name, f"{what}: time and memory of a step; takes Megatron's and --vwn-* flags")
        mode.add_argument("--recipe", metavar="NAME", help="shape and virtual width of a recipe's repeated layer")
        mode.add_argument(
            "--recompute-block", type=_positive, nargs="+", default=[4], metavar="K", help="values to try (default: 4)"
        )
        _measuring(mode, rounds=9)

    tune = _mode(
        modes, "tune", "find the fastest tiles of the kernels on this machine's GPU; they are used from then on"
    )
    _sizes(tune, [2048], "8192")
    tune.add_argument("--predict", metavar="GPU", help="ask the model of an h200 or h100, and write nothing")
    tune.add_argument("--minutes", type=_minutes, default=15, metavar="M", help="at most (default: %(default)s)")

    table = _mode(modes, "table", "what r costs: floors, predictions and committed measurements, as Markdown")
    for field, value in vars(_benchmark_table.Rates()).items():
        table.add_argument(
            f"--{field.replace('_', '-')}",
            type=type(value),
            default=value,
            metavar="X",
            help="default: %(default)g" if isinstance(value, float) else "default: %(default)s",
        )
    table.add_argument("--results", type=Path, default=report.RESULTS, metavar="DIR", help="committed results")

    results = _mode(modes, "results", "what tests/gpu/run.sh measured, as Markdown tables")
    results.add_argument("file", type=Path, metavar="FILE", help="its results.json")
    results.add_argument(
        "--commit-results",
        action="store_true",
        help="keep them in megatron_vwn/benchmark/results, and calibrate --predict with them",
    )
    return parser


def _mode(modes, name: str, what: str) -> argparse.ArgumentParser:
    return modes.add_parser(name, help=what, description=what, allow_abbrev=False)


def _sizes(parser: argparse.ArgumentParser, hidden_sizes: list[int], tokens: str) -> None:
    """Which operations' sizes are looked at."""
    parser.add_argument("--pairs", type=_pair, nargs="+", default=PAIRS, metavar="M,N", help="default: six of them")
    parser.add_argument(
        "--hidden-size",
        type=_positive,
        nargs="+",
        default=hidden_sizes,
        metavar="D",
        help=f"default: {' '.join(map(str, hidden_sizes))}",
    )
    parser.add_argument("--tokens", type=_positive, metavar="T", help=f"default: {tokens}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")


def _measuring(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """What all modes that measure have."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=rounds, help="samples of each variant (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=_positive, default=3, help="rounds before them (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="default: results/MODE-DEVICE.json")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there")
    parser.add_argument(
        "--commit-results",
        action="store_true",
        help="write to megatron_vwn/benchmark/results instead",
    )
    parser.add_argument("--commit", metavar="HASH", help="what to record where there is no git checkout")

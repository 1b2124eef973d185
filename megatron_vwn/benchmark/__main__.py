"""vwn-benchmark: what a virtual width costs, against the least it can cost.

Every variant is compared with a trusted computation first, and one that disagrees gets no time. Variants take turns
(A B A B), caches are cold for single operations, and times are medians.
"""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

# Megatron warns that Apex is missing; the table says so: "local layers".
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.|torch\.distributed\.")

from tqdm import tqdm  # noqa: E402

from megatron_vwn.atomic import write_json  # noqa: E402
from megatron_vwn.benchmark import calibration, machine, report  # noqa: E402
from megatron_vwn.benchmark import table as _benchmark_table  # noqa: E402
from megatron_vwn.cli import exit_code  # noqa: E402
from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.ops.costs import OPS, PASSES, Op, Width  # noqa: E402
from megatron_vwn.planner import kernel_times  # noqa: E402

PROGRAM = "vwn-benchmark"
PAIRS = ((2, 3), (1, 4), (4, 16), (1, 8), (4, 32), (8, 64))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENS = {"cuda": 8192, "cpu": 256}
# Layers to compare where the user names no shape; any of Megatron's flags replaces its namesake.
_SHAPE = {
    "cuda": "--hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --seq-length 4096 "
    "--micro-batch-size 2 --bf16",
    "cpu": "--hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 704 --seq-length 256 --micro-batch-size 1",
}
_DEPTH = {"layer": "*-", "model": "*-*-"}

EPILOG = """\
examples
  vwn-benchmark kernels --pairs 4,16 8,64 --hidden-size 2048
  vwn-benchmark --compile-only sm_90
  vwn-benchmark --predict h200 --pairs 4,16 --hidden-size 2048
  vwn-benchmark layer --recipe moe-a3.3b --recompute-block 4 8
  vwn-benchmark model --vwn-m 4 --vwn-n 16 --hidden-size 1024 --hybrid-layer-pattern '*-*-*-*-' ...
  vwn-benchmark tune --pairs 4,32 --minutes 10
  vwn-benchmark table

layer and model take Megatron's flags; those they are not given come from --recipe, or are those of a small layer
without a GPU and of one of D = 2048 with one. Results are written as JSON, with hardware, versions and commit.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0, 1 if a variant disagrees or fails, 2 for a refusal, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith(("--compile-only", "--predict")):
        argv.insert(0, "kernels")
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: list[str]) -> int:
    options, rest = _parser().parse_known_args(argv)
    if rest and options.mode not in ("layer", "model"):
        raise VirtualWidthError(f"unknown argument {rest[0]}: see --help.")
    return _MODES[options.mode](options, rest, argv)


def _kernels(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    from megatron_vwn.benchmark import kernels
    from megatron_vwn.benchmark.operations import Problem

    if options.compile_only or options.predict:
        return (_predict if options.predict else _compile_only)(options, argv)
    device = _device(options)
    known = kernels.variants()
    wanted = options.variants or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise VirtualWidthError(f"--variants {unknown[0]!r} is none of {', '.join(map(repr, known))}.")
    widths = _widths(options)
    path = _output(options, "kernels", device)
    dtype, tokens = DTYPES[options.dtype], options.tokens or _TOKENS[device.type]
    problems = [
        Problem(op, width, tokens, dtype, device)
        for width in widths
        for op in options.ops or OPS
        if _possible(op, width)
    ]
    rates = machine.measure_rates(device, dtype)
    print(
        f"{machine.device_name(device)}: copy {rates.bandwidth / 1e9:.1f} GB/s, "
        f"{options.dtype} matrix product {rates.flop_rate / 1e9:.0f} GFLOP/s"
    )
    results: list[dict] = []
    with tqdm(problems, unit="problem", disable=None) as bar:
        for problem in bar:
            width = problem.width
            name = f"{problem.op} ({width.m},{width.n}) D={width.hidden_size}"
            candidates = [known[n] for n in wanted if kernels.concerns(known[n], problem)]
            results += kernels.run_problem(
                problem,
                candidates,
                rates,
                warmup=options.warmup,
                rounds=options.rounds,
                say=lambda text, name=name: bar.set_description(f"{name}: {text}"),
            )
    print(report.table(kernels.HEADER, kernels.table_rows(results)))
    settings = {"copy_bytes_per_second": rates.bandwidth, "matrix_flops_per_second": rates.flop_rate}
    settings |= {"rounds": options.rounds, "warmup": options.warmup}
    return _finish(path, "kernels", device, argv, settings, results, options)


def _compile_only(options: argparse.Namespace, argv: list[str]) -> int:
    _no_interpreter()
    from megatron_vwn.benchmark import compile as compiling
    from megatron_vwn.benchmark.operations import Kernels

    architecture = options.compile_only
    if architecture not in compiling.ARCHITECTURES:
        raise VirtualWidthError(
            f"--compile-only {architecture} is none of {', '.join(compiling.ARCHITECTURES)}: choose one of them."
        )
    device = torch.device("cpu")
    path = _output(options, f"compile-{architecture}", device)
    results: list[dict] = []
    # "connection" launches the kernels of read and write.
    for op, width in _without_gpu(options, [op for op in options.ops or OPS if op != "connection"]):
        results += compiling.compile_problem(Kernels(), op, width, DTYPES[options.dtype], architecture)
    print(report.table(compiling.HEADER, compiling.table_rows(results)))
    return _finish(path, "compile", device, argv, {"architecture": architecture}, results, options)


def _predict(options: argparse.Namespace, argv: list[str]) -> int:
    _no_interpreter()
    from megatron_vwn.benchmark import predict
    from megatron_vwn.benchmark.model import GPUS
    from megatron_vwn.benchmark.operations import Kernels

    names = options.predict
    if unknown := [name for name in names if name not in GPUS]:
        raise VirtualWidthError(f"--predict {unknown[0]} is none of {', '.join(GPUS)}: choose of them.")
    path = _output(options, f"predict-{'-'.join(names)}", None)
    tokens, dtype = options.tokens or _TOKENS["cuda"], DTYPES[options.dtype]
    results: list[dict] = []
    for op, width in _without_gpu(options, options.ops or ["write_read"]):
        results += predict.predict_problem(Kernels(), op, width, tokens, dtype, names)
    print(report.table(predict.HEADER, predict.table_rows(results)))
    print(*predict.assumptions(names), sep="\n")
    settings = {"calibration": predict.CALIBRATION, "gpus": {name: vars(GPUS[name]) for name in names}}
    settings["factors"] = {
        name: {direction: found.mean for direction in PASSES if (found := calibration.factor(name, direction))}
        for name in names
    }
    code = _finish(path, "predict", torch.device("cpu"), argv, settings, results, options)
    if options.for_planner and code == 0:
        kernel_times.write(json.loads(path.read_text()))
        print(f"{kernel_times.PATH} has what vwn-plan takes of it")
    return code


def _no_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise VirtualWidthError("TRITON_INTERPRET=1 keeps Triton from compiling: unset it.")


def _without_gpu(options: argparse.Namespace, ops: Iterable[Op]) -> Iterator[tuple[Op, Width]]:
    """What is compiled, with a bar."""
    problems = [(op, width) for width in _widths(options) for op in ops if _possible(op, width)]
    with tqdm(problems, unit="operation", disable=None) as bar:
        for op, width in bar:
            bar.set_description(f"{op} ({width.m},{width.n}) D={width.hidden_size}")
            yield op, width


def _possible(op: Op, width: Width) -> bool:
    return op != "reduce_norm" or width.n % width.m == 0


def _steps(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    device = _device(options)
    width, flags = _split_width(rest)
    defaults, recipe_width = _shape(options, device)
    width = width or recipe_width
    if not width:
        raise VirtualWidthError("there is nothing to compare without a virtual width: add --vwn-m and --vwn-n.")
    path = _output(options, options.mode, device)
    from megatron_vwn import cpu

    if device.type == "cpu":
        if machine.has_gpu():
            raise VirtualWidthError("--device cpu with a GPU present: hide it with an empty CUDA_VISIBLE_DEVICES.")
        cpu.install()
    # Only now: Megatron looks for CUDA while it is imported.
    from megatron_vwn.benchmark import steps

    flags = _with_defaults(flags, defaults)
    found = steps.candidates(flags, width, options.recompute_block, gpu=device.type == "cuda")
    description = found[0].description
    rates = machine.measure_rates(device, description.dtype)
    with tqdm(disable=None, bar_format="{desc}") as bar:
        results = steps.run(
            found,
            steps.Layers if options.mode == "layer" else steps.Loss,
            device,
            bandwidth=rates.bandwidth,
            warmup=options.warmup,
            rounds=options.rounds,
            say=bar.set_description_str,
        )
    args = description.args
    print(
        f"{machine.device_name(device)}: {args.hybrid_layer_pattern} of D = {args.hidden_size}, {args.seq_length} x "
        f"{args.micro_batch_size} tokens, {str(description.dtype).removeprefix('torch.')}, {args.transformer_impl} "
        f"layers; {'forward and backward' if options.mode == 'layer' else 'forward, backward and optimizer'}"
    )
    print(report.table(steps.HEADER, steps.table_rows(results)))
    settings = {
        "flags": flags,
        "virtual_width": width,
        "transformer_impl": args.transformer_impl,
        "copy_bytes_per_second": rates.bandwidth,
        "matrix_flops_per_second": rates.flop_rate,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "memory_by": "allocator" if device.type == "cuda" else "storages that torch operations return",
    }
    return _finish(path, options.mode, device, argv, settings, results, options)


def _tune(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    model = options.predict
    if model is None and not machine.has_gpu():
        raise VirtualWidthError(
            "there is no GPU to tune kernels on: run tune on the machine that trains, or ask a model with --predict."
        )
    _no_interpreter()
    from megatron_vwn.benchmark import tune
    from megatron_vwn.benchmark.model import GPUS
    from megatron_vwn.benchmark.operations import Problem

    if model is not None and model not in GPUS:
        raise VirtualWidthError(f"--predict {model} is none of {', '.join(GPUS)}: choose one of them.")
    device = torch.device("cuda" if model is None else "meta")
    tokens, dtype = options.tokens or _TOKENS["cuda"], DTYPES[options.dtype]
    problems = [Problem("write_read", width, tokens, dtype, device) for width in _widths(options)]
    rows = tune.tune(problems, 60 * options.minutes, partial(print, flush=True), gpu=model)
    if model is None:
        print(f"{tune.write(rows)} has {len(rows)} new tiles; kernels read it before their first launch")
    else:
        print(f"{len(rows)} tiles are faster by a model, which is no measurement: nothing was written")
    return 0


def _table(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    rates = _benchmark_table.Rates(**{name: getattr(options, name) for name in vars(_benchmark_table.Rates())})
    if options.results != report.RESULTS and not options.results.is_dir():
        raise VirtualWidthError(f"--results {options.results} is no folder: give one with results, or drop it.")
    if rates.gpu not in (known := kernel_times.gpus()):
        raise VirtualWidthError(f"--gpu {rates.gpu} is not predicted: choose one of {', '.join(known)}.")
    try:
        print(_benchmark_table.markdown(rates, options.results), end="")
    except ValueError as error:
        raise VirtualWidthError(f"--hidden-size does not fit: {error}") from error
    return 0


def _results(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    from megatron_vwn.benchmark import results

    content = results.read(options.file)
    print(results.markdown(content), end="")
    if options.commit_results:
        for path in results.commit(content):
            print(f"{path} is written")
    return 0


_MODES = {
    "kernels": _kernels,
    "layer": _steps,
    "model": _steps,
    "tune": _tune,
    "table": _table,
    "results": _results,
}


def _finish(path: Path, mode: str, device, argv, settings: dict, results: list[dict], options) -> int:
    content = report.report(mode, device, argv, settings, results, commit=options.commit)
    write_json(path, content)
    print(f"{path} has this and more")
    return report.exit_code(results)


def _output(options: argparse.Namespace, mode: str, device: torch.device | None) -> Path:
    return report.choose_path(
        options.output, mode, device, committed=options.commit_results, overwrite=options.overwrite
    )


def _device(options: argparse.Namespace) -> torch.device:
    name = options.device
    if name == "auto":
        name = "cuda" if machine.has_gpu() else "cpu"
    if name == "cuda" and not machine.has_gpu():
        raise VirtualWidthError("--device cuda, but there is no GPU: drop it to measure on the CPU.")
    return torch.device(name)


def _widths(options: argparse.Namespace) -> list[Width]:
    try:
        return [Width(m, n, hidden) for m, n in options.pairs for hidden in options.hidden_size]
    except ValueError as error:
        raise VirtualWidthError(f"--pairs and --hidden-size do not fit: {error}") from error


def _split_width(rest: list[str]) -> tuple[list[str], list[str]]:
    """The ``--vwn-*`` flags with their values, and all others."""
    width: list[str] = []
    others: list[str] = []
    current = others
    for token in rest:
        if token.startswith("--"):
            current = width if token.startswith("--vwn-") else others
        current.append(token)
    return width, others


def _with_defaults(flags: list[str], defaults: list[str]) -> list[str]:
    """Flags completed by the defaults that they do not name."""
    typed = {flag.partition("=")[0] for flag in flags}
    completed, wanted = list(flags), False
    for word in defaults:
        if word.startswith("--"):
            wanted = word not in typed and not (word == "--bf16" and "--fp16" in typed)
        if wanted:
            completed.append(word)
    return completed


def _shape(options: argparse.Namespace, device: torch.device) -> tuple[list[str], list[str]]:
    """Flags of the model and of the virtual width where the user gives none: those of a recipe's deepest layer, or a
    small model."""
    pattern = ["--hybrid-layer-pattern", _DEPTH[options.mode]]
    if options.recipe is None:
        return [*_SHAPE[device.type].split(), *pattern], []
    from megatron_vwn.recipes.flags import typed
    from megatron_vwn.recipes.recipe import read_recipe

    sections = read_recipe(options.recipe).sections
    model = dict(sections["model"])
    blocks = model.pop("layers", None)
    if not blocks or model.pop("hybrid-layer-pattern", None):
        raise VirtualWidthError(f"{options.recipe} does not list its layers: give layers to benchmark one of them.")
    pattern[1] = blocks[-1][1] * (1 if options.mode == "layer" else 2)
    # One rank's layers: no further predictions, no padding of the vocabulary for ranks.
    model = {key: value for key, value in model.items() if not key.startswith(("mtp", "padded"))}
    if "num-experts" in model:
        model["moe-token-dispatcher-type"] = sections["layout"].get("moe-token-dispatcher-type", "alltoall")
    if device.type == "cuda":
        model |= {"bf16": True}
        if find_spec("transformer_engine") is not None:
            model |= {key: value for key, value in sections["gpu"].items() if key.startswith(("moe", "attention"))}
    words = [word for key, value in model.items() for word in typed(key, value)]
    width = [word for key, value in sections["virtual_width"].items() for word in typed(key, value)]
    return [*words, "--micro-batch-size", "1", *pattern], width


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=__doc__.splitlines()[0],
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


if __name__ == "__main__":
    sys.exit(main())

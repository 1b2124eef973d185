"""vwn-benchmark: what a virtual width costs, against the least it can cost.

Every variant is compared with a trusted computation first, and one that disagrees gets no time. Variants take turns
(A B A B), caches are cold for single operations, and times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vwn.atomic import write_json
from megatron_vwn.benchmark import report
from megatron_vwn.benchmark import table as _benchmark_table
from megatron_vwn.benchmark.arguments import DTYPES, PROGRAM, parser
from megatron_vwn.cli import exit_code, flag_groups, progress_bar
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops.costs import OPS, Op, Width
from megatron_vwn.planner import kernel_times

if TYPE_CHECKING:
    import torch

_TOKENS = {"cuda": 8192, "cpu": 256}
# Layers to compare where the user names no shape; any of Megatron's flags replaces its namesake.
_SHAPE = {
    "cuda": "--hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --seq-length 4096 "
    "--micro-batch-size 2 --bf16",
    "cpu": "--hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 704 --seq-length 256 --micro-batch-size 1",
}
_DEPTH = {"layer": "*-", "model": "*-*-"}


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0, 1 if a variant disagrees or fails, 2 for a refusal, 128 + the signal that ended it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith(("--compile-only", "--predict")):
        argv.insert(0, "kernels")
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: list[str]) -> int:
    # Megatron warns that Apex is missing; the table says so: "local layers".
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.|torch\.distributed\.")
    options, rest = parser(__doc__.splitlines()[0]).parse_known_args(argv)
    if rest and options.mode not in ("layer", "model"):
        raise VirtualWidthError(f"unknown argument {rest[0]}: see --help.")
    return _MODES[options.mode](options, rest, argv)


def _kernels(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    if options.compile_only or options.predict:
        return (_predict if options.predict else _compile_only)(options, argv)
    from tqdm import tqdm

    from megatron_vwn.benchmark import kernels, machine
    from megatron_vwn.benchmark.operations import Problem

    device = _device(options)
    known = kernels.variants()
    wanted = options.variants or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise VirtualWidthError(f"--variants {unknown[0]!r} is none of {', '.join(map(repr, known))}.")
    widths = _widths(options)
    path = _output(options, "kernels", device)
    dtype, tokens = _dtype(options), options.tokens or _TOKENS[device.type]
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
    import torch

    from megatron_vwn.benchmark.operations import Kernels
    from megatron_vwn.benchmark.prediction import compile as compiling

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
        results += compiling.compile_problem(Kernels(), op, width, _dtype(options), architecture)
    print(report.table(compiling.HEADER, compiling.table_rows(results)))
    return _finish(path, "compile", device, argv, {"architecture": architecture}, results, options)


def _predict(options: argparse.Namespace, argv: list[str]) -> int:
    _no_interpreter()
    import torch

    from megatron_vwn.benchmark.operations import Kernels
    from megatron_vwn.benchmark.prediction import calibration, predict
    from megatron_vwn.benchmark.prediction.model import GPUS

    names = options.predict
    if unknown := [name for name in names if name not in GPUS]:
        raise VirtualWidthError(f"--predict {unknown[0]} is none of {', '.join(GPUS)}: choose of them.")
    path = _output(options, f"predict-{'-'.join(names)}", None)
    tokens, dtype = options.tokens or _TOKENS["cuda"], _dtype(options)
    results: list[dict] = []
    for op, width in _without_gpu(options, options.ops or ["write_read"]):
        results += predict.predict_problem(Kernels(), op, width, tokens, dtype, names)
    print(report.table(predict.HEADER, predict.table_rows(results)))
    print(*predict.assumptions(names), sep="\n")
    settings = {"calibration": predict.CALIBRATION, "gpus": {name: vars(GPUS[name]) for name in names}}
    settings["factors"] = {name: calibration.means(name) for name in names}
    code = _finish(path, "predict", torch.device("cpu"), argv, settings, results, options)
    if options.for_planner and code == 0:
        kernel_times.write(json.loads(path.read_text()))
        print(f"{kernel_times.PATH} has what vwn-plan takes of it")
    return code


def _no_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise VirtualWidthError("TRITON_INTERPRET=1 keeps Triton from compiling: unset it.")


def _without_gpu(options: argparse.Namespace, ops: Iterable[Op]) -> Iterator[tuple[Op, Width]]:
    """What is compiled, and how far that is."""
    problems = [(op, width) for width in _widths(options) for op in ops if _possible(op, width)]
    return progress_bar(
        problems, "compiling", "operation", lambda each: f"{each[0]} ({each[1].m},{each[1].n}) D={each[1].hidden_size}"
    )


def _possible(op: Op, width: Width) -> bool:
    return op != "reduce_norm" or width.n % width.m == 0


def _steps(options: argparse.Namespace, rest: list[str], argv: list[str]) -> int:
    from tqdm import tqdm

    from megatron_vwn.benchmark import machine

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
    import torch

    from megatron_vwn.benchmark import machine

    model = options.predict
    if model is None and not machine.has_gpu():
        raise VirtualWidthError(
            "there is no GPU to tune kernels on: run tune on the machine that trains, or ask a model with --predict."
        )
    _no_interpreter()
    from megatron_vwn.benchmark import tune
    from megatron_vwn.benchmark.operations import Problem
    from megatron_vwn.benchmark.prediction.model import GPUS

    if model is not None and model not in GPUS:
        raise VirtualWidthError(f"--predict {model} is none of {', '.join(GPUS)}: choose one of them.")
    device = torch.device("cuda" if model is None else "meta")
    tokens, dtype = options.tokens or _TOKENS["cuda"], _dtype(options)
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


def _dtype(options: argparse.Namespace) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[options.dtype])


def _device(options: argparse.Namespace) -> torch.device:
    import torch

    from megatron_vwn.benchmark import machine

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
    for group in flag_groups(rest):
        (width if group[0].startswith("--vwn-") else others).extend(group)
    return width, others


def _with_defaults(flags: list[str], defaults: list[str]) -> list[str]:
    """Flags completed by the defaults that they do not name."""
    given = {flag.partition("=")[0] for flag in flags}
    if "--fp16" in given:
        given.add("--bf16")  # the other of the two
    return [*flags, *(word for group in flag_groups(defaults) if group[0] not in given for word in group)]


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


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second of Megatron's data loader and of DALI on the same samples.

Each loader keeps its workers; they are timed in turn, round by round, so that what else the machine does meets all of
them. The first batches are compared: both must be the same bits.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch

from megatron_vwn.atomic import write_json
from megatron_vwn.benchmark import report as reports
from megatron_vwn.benchmark.machine import device_name
from megatron_vwn.cli import exit_code
from megatron_vwn.data.indexed import check_indexed_dataset

PROGRAM = "benchmark_data"
_VOCABULARY = 50_000
# Documents of web text: many short ones, few long ones. Log-normal, in tokens.
_DOCUMENT_MEDIAN, _DOCUMENT_SIGMA = 400, 1.0
_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
EPILOG = """\
columns
  tokens/s            by the clock: the loader alone, nothing computes meanwhile; median, lowest and highest round
  training process    CPU milliseconds per micro-batch that the process which trains gives to reading

A loader is fast enough when it has several times the tokens per second of one data-parallel rank's training.
"""


@dataclass
class Contender:
    """A loader that is timed, and the rounds so far."""

    loader: str
    workers: int
    batches: Iterator[dict[str, torch.Tensor]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 1 when the loaders disagree, 2 for a refusal."""
    arguments = _parser().parse_args(argv)
    # Megatron and torch complain about GPU libraries that reading does not need.
    with warnings.catch_warnings(action="ignore"):
        return exit_code(PROGRAM, lambda: _run(arguments, sys.argv[1:] if argv is None else argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vwn.benchmark.loaders",
        description="Compare --dataloader-type single and external: tokens per second of the loaders alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-path", nargs="+", metavar="PREFIX", help=".bin/.idx to read (default: synthetic)")
    parser.add_argument("--tokens", type=_positive, default=20_000_000, help="of synthetic data (default: %(default)s)")
    parser.add_argument("--seq-length", type=_positive, default=4096, help="default: %(default)s")
    parser.add_argument("--micro-batch-size", type=_positive, default=4, help="default: %(default)s")
    parser.add_argument(
        "--num-workers", type=_workers, default=[0, 2], metavar="N[,N...]", help="processes that read (default: 0,2)"
    )
    parser.add_argument("--attention-mask", action="store_true", help="with --create-attention-mask-in-dataloader")
    parser.add_argument("--batches", type=_positive, default=100, help="micro-batches of a round (%(default)s)")
    parser.add_argument("--rounds", type=_positive, default=7, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: results/data-DEVICE.json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _workers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 0,2")
    return sorted({int(part) for part in text.split(",")})


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    for prefix in arguments.data_path or ():
        check_indexed_dataset(prefix)
    from megatron_vwn.data.dali import require_dali

    require_dali()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = reports.choose_path(arguments.output, "data", device, committed=False, overwrite=arguments.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        prefixes = arguments.data_path or [_synthetic(Path(folder, "synthetic"), arguments.tokens)]
        contenders = _contenders(arguments, _dataset(arguments, prefixes, folder))
        agree = _agree([next(contender.batches) for contender in contenders])
        if agree:
            for number in range(arguments.rounds):
                # Every other round backwards: nobody always comes after the same neighbour.
                for contender in contenders[:: -1 if number % 2 else 1]:
                    _time(contender, arguments.batches)
                print(f"{PROGRAM}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
    results = [_result(contender, arguments) for contender in contenders] if agree else []
    content = reports.report("data", device, argv, _settings(arguments), results, commit=None)
    content |= {"program": PROGRAM}
    content["versions"]["nvidia-dali"] = _dali_version()
    if not agree:
        print(f"{PROGRAM}: the loaders' batches differ; nothing was timed.", file=sys.stderr)
        return 1
    print(f"{device_name(device)}; {', '.join(f'{name} {value}' for name, value in content['settings'].items())}")
    header = ["loader", "workers", "Mtokens/s", "lowest to highest", "training process, CPU ms per micro-batch"]
    print(reports.table(header, [_row(result) for result in results]))
    write_json(path, content)
    print(f"written to {path}")
    return 0


def _synthetic(prefix: Path, tokens: int) -> str:
    """Random documents, each ending with the last token id."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    builder, written = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16), 0
    while written < tokens:
        length = 1 + int(random.lognormal(np.log(_DOCUMENT_MEDIAN), _DOCUMENT_SIGMA))
        document = random.integers(0, _VOCABULARY - 1, length, dtype=np.uint16)
        document[-1] = _VOCABULARY - 1
        builder.add_document(torch.from_numpy(document), [length])
        written += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def _dataset(arguments: argparse.Namespace, prefixes: list[str], folder: str):
    """Megatron's training data over these files; its indices go to a folder of this run."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=arguments.seq_length,
        blend=(prefixes, [1.0] * len(prefixes) if len(prefixes) > 1 else None),
        split="1,0,0",
        path_to_cache=f"{folder}/cache",
        tokenizer=NullTokenizer(_VOCABULARY),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=arguments.attention_mask,
    )
    # One batch to compare, the rounds, and what workers read ahead of the last.
    samples = (arguments.rounds * arguments.batches + 100) * arguments.micro_batch_size
    return BlendedMegatronDatasetBuilder(GPTDataset, (samples, 0, 0), lambda: True, config).build()[0]


def _contenders(arguments: argparse.Namespace, dataset) -> list[Contender]:
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from megatron_vwn.data.dali import DaliLoader, micro_batch_starts

    size, gpu, contenders = arguments.micro_batch_size, torch.cuda.is_available(), []
    for workers in arguments.num_workers:
        # As megatron.training.datasets.data_samplers does for --dataloader-type single.
        single = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=MegatronPretrainingSampler(len(dataset), 0, size, 0, 1),
            num_workers=workers,
            pin_memory=gpu,
            persistent_workers=workers > 0,
        )
        external = DaliLoader(dataset, micro_batch_starts(len(dataset), 0, size, 0, 1), size, workers=workers)
        contenders += [
            Contender("Megatron, single", workers, iter(single)),
            Contender("DALI, external", workers, iter(external)),
        ]
    return contenders


def _agree(batches: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(batch[key].cpu(), batches[0][key].cpu()) for batch in batches for key in _KEYS if key in batches[0]
    )


def _time(contender: Contender, batches: int) -> None:
    """One round: batches to the device on which a model would read them."""
    gpu = torch.cuda.is_available()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(batches):
        batch = next(contender.batches)
        if gpu:
            batch = {key: batch[key].cuda(non_blocking=True) for key in _KEYS if key in batch}
    if gpu:
        torch.cuda.synchronize()
    contender.seconds.append(time.perf_counter() - start)
    contender.cpu_seconds.append(time.process_time() - cpu_start)


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    names = ("seq_length", "micro_batch_size", "attention_mask", "batches", "rounds")
    data = f"{len(arguments.data_path)} given" if arguments.data_path else f"{arguments.tokens} synthetic tokens"
    return {"data": data} | {name: getattr(arguments, name) for name in names}


def _result(contender: Contender, arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds are of one micro-batch."""
    seconds, cpu = ([each / arguments.batches for each in kind] for kind in (contender.seconds, contender.cpu_seconds))
    tokens = arguments.micro_batch_size * arguments.seq_length
    return {
        "loader": contender.loader,
        "workers": contender.workers,
        "status": "measured",
        "seconds": {"median": median(seconds), "low": min(seconds), "high": max(seconds)},
        "cpu_seconds_of_the_training_process": {"median": median(cpu), "low": min(cpu), "high": max(cpu)},
        "tokens_per_second": {
            "median": tokens / median(seconds),
            "low": tokens / max(seconds),
            "high": tokens / min(seconds),
        },
    }


def _row(result: dict) -> list[str]:
    rate = {name: value / 1e6 for name, value in result["tokens_per_second"].items()}
    return [
        result["loader"],
        str(result["workers"]),
        f"{rate['median']:.1f}",
        f"{rate['low']:.1f} to {rate['high']:.1f}",
        f"{1e3 * result['cpu_seconds_of_the_training_process']['median']:.2f}",
    ]


def _dali_version() -> str:
    import nvidia.dali

    return nvidia.dali.__version__


if __name__ == "__main__":
    sys.exit(main())

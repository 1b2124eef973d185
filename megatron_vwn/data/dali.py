"""``--dataloader-type external``: Megatron's data sets read by NVIDIA DALI instead of torch's DataLoader.

Megatron passes what the provider of datasets returns through to its training loop as iterators. The iterators here
yield the batches of ``--dataloader-type single``, bit for bit and in its order, from any number of consumed samples on:

    token windows (``windows``)  ->  DALI: workers, queue, copy to the GPU, cast  ->  torch: shift and masks

Only 4 bytes per token cross process borders and the bus; labels, masks and positions, 24 bytes per token and more, are
made where they are used. DALI is imported when such an iterator is built.
"""

import argparse
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.indexed import check_token_ids, map_sequences
from megatron_vwn.data.windows import BlendedWindows, TokenWindows, WindowSource

# Micro-batches that wait for the training loop, per stage of the pipeline and, in processes, per worker.
_QUEUE_DEPTH = 2


def check_dali(args: argparse.Namespace) -> None:
    """Refuse flags that contradict ``--dataloader-type external``, and a machine without DALI.

    Args:
        args: Megatron's flags, parsed; they need not be validated.

    Raises:
        VirtualWidthError: the first fault.
    """
    if args.mock_data:
        raise VirtualWidthError("--dataloader-type external reads files and --mock-data has none: choose single.")
    if not args.mmap_bin_files:
        raise VirtualWidthError("--dataloader-type external maps files: drop --no-mmap-bin-files or choose single.")
    if args.phase_transition_iterations:
        raise VirtualWidthError(
            "--dataloader-type external does not begin anew at --phase-transition-iterations: choose single."
        )
    require_dali()


def require_dali() -> None:
    """Refuse a machine where DALI cannot be imported.

    Raises:
        VirtualWidthError: says how to install it.
    """
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        raise VirtualWidthError(
            f"--dataloader-type external needs NVIDIA DALI, which cannot be imported ({error}): pip install "
            "'megatron_vwn[dali]', or choose single."
        ) from None


def data_loaders(args: argparse.Namespace, datasets: Sequence) -> list:
    """What stands for the data sets of a rank when Megatron asks for them with ``--dataloader-type external``.

    Args:
        args: Megatron's validated flags, with the samples consumed so far.
        datasets: training, validation and test data as Megatron builds them; None where there is none or this rank
            reads none, a list for several validation sets.
    """
    train, valid, test = datasets
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()

    def loader(dataset, *, consumed: int, micro_batch: int, whole: bool = False) -> DaliLoader | None:
        if dataset is None:
            return None
        starts = (
            range(rank, len(dataset), size)
            if whole
            else micro_batch_starts(len(dataset), consumed, micro_batch, rank, size)
        )
        return DaliLoader(
            dataset,
            starts,
            micro_batch,
            workers=args.num_workers,
            exit_signal=args.exit_signal if args.exit_signal_handler else None,
        )

    evaluation = {"micro_batch": args.eval_micro_batch_size, "whole": args.full_validation}
    evaluation["consumed"] = 0 if args.skip_train or args.full_validation else args.consumed_valid_samples
    return [
        loader(
            None if args.skip_train else train,
            consumed=args.consumed_train_samples,
            micro_batch=args.micro_batch_size,
        ),
        [loader(each, **evaluation) for each in valid] if isinstance(valid, list) else loader(valid, **evaluation),
        loader(test, consumed=0, micro_batch=args.eval_micro_batch_size),
    ]


def micro_batch_starts(samples: int, consumed: int, micro_batch: int, rank: int, size: int) -> range:
    """First sample of each micro-batch of a data-parallel rank, as Megatron's MegatronPretrainingSampler deals them.

    Args:
        samples: in the data set; those that do not fill a micro-batch of every rank are left out.
        consumed: samples that all ranks together have had.
        micro_batch: samples per rank.
        rank: data-parallel rank.
        size: data-parallel ranks.
    """
    return range(consumed + rank * micro_batch, samples - (size - rank) * micro_batch + 1, size * micro_batch)


class DaliLoader:
    """Micro-batches of a data set, on the GPU where there is one; iterable again when it has ended.

    Reading begins with the first batch that is asked for, so a loader that is never asked starts no process.

    Args:
        dataset: a GPTDataset over local files, or a blend of them.
        starts: first sample of each micro-batch.
        micro_batch: samples in one.
        workers: processes that read ahead; 0 reads in this process.
        exit_signal: that workers leave to this process, besides the interrupt of a terminal.
    """

    def __init__(
        self,
        dataset: GPTDataset | BlendedDataset,
        starts: range,
        micro_batch: int,
        *,
        workers: int,
        exit_signal: int | None = None,
    ):
        ignored = {signal.SIGINT} | ({exit_signal} - {None})
        self._source = WindowSource(_windows(dataset), starts, micro_batch, sorted(ignored))
        self._workers = workers
        part = dataset.datasets[0] if isinstance(dataset, BlendedDataset) else dataset
        self._config, self._pad = part.config, part._pad_token_id
        self._vocabulary_size = part.config.tokenizer.vocab_size
        self._batches: Iterator | None = None
        self._constants: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Micro-batches from beginning to end."""
        return len(self._source.starts)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The keys, shapes and types of a GPTDataset's samples behind torch's default collation.

        Position ids and the attention mask are the same tensors every time, unless flags make them depend on the text.

        Raises:
            VirtualWidthError: the batch has a token id beyond the tokenizer's.
        """
        if not len(self):
            raise StopIteration
        if self._batches is None:
            self._batches = _read(self._source, self._workers)
        (batch,) = next(self._batches)
        check_token_ids(0, int(batch["largest"].max()), self._vocabulary_size, "a batch of the data")
        return self._sample(batch["text"])

    def _sample(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """What GPTDataset.__getitem__ makes of windows [micro-batch, sequence + 1] int64."""
        config, (tokens, labels) = self._config, (text[:, :-1], text[:, 1:])
        counts = labels != self._pad
        ends = tokens == config.tokenizer.eod
        if config.eod_mask_loss:
            counts &= ~ends
        batch = {
            "tokens": tokens.masked_fill(tokens == self._pad, 0),
            "labels": labels.masked_fill(labels == self._pad, 0),
            "loss_mask": counts.float(),
            "position_ids": self._constant("position_ids", text),
        }
        if config.create_attention_mask:
            batch["attention_mask"] = self._constant("attention_mask", text)
        if config.reset_position_ids or config.reset_attention_mask:
            # Where the document of each token begins: behind the last end of a document before it.
            position = batch["position_ids"]
            begins = (position + 1).masked_fill(~ends, 0).roll(1, dims=1)
            begins[:, 0] = 0
            begins = begins.cummax(dim=1).values
            if config.reset_position_ids:
                batch["position_ids"] = position - begins
            if config.reset_attention_mask and config.create_attention_mask:
                other = begins[:, None, :, None] != begins[:, None, None, :]
                batch["attention_mask"] = batch["attention_mask"] | other
        return batch

    def _constant(self, key: str, text: torch.Tensor) -> torch.Tensor:
        """Positions [micro-batch, sequence] int64 or the causal mask [micro-batch, 1, sequence, sequence] bool."""
        if key not in self._constants:
            micro_batch, length = text.shape[0], text.shape[1] - 1
            position = torch.arange(length, device=text.device)
            value = position if key == "position_ids" else (position > position[:, None])[None]
            self._constants[key] = value.repeat(micro_batch, *[1] * value.dim()).view(micro_batch, *value.shape)
        return self._constants[key]


def _read(source: WindowSource, workers: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """A DALI pipeline that begins anew after its end.

    It yields [{"text": [micro-batch, sequence + 1] int64, "largest": [micro-batch] int32}]. The largest token ids stay
    on the CPU, so that nobody waits for the GPU to look at them.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    # torch.cuda also says yes where a GPU is only emulated.
    gpu = torch.accelerator.is_available()

    @pipeline_def(
        batch_size=source.size,
        num_threads=1,
        device_id=torch.cuda.current_device() if gpu else None,
        prefetch_queue_depth=_QUEUE_DEPTH,
        py_num_workers=max(1, workers),
        # A process with a CUDA context cannot be forked.
        py_start_method="spawn",
    )
    def pipeline():
        text = fn.external_source(
            source,
            batch=True,
            batch_info=True,
            parallel=workers > 0,
            prefetch_queue_depth=_QUEUE_DEPTH * workers or None,
            dtype=dali_types.INT32,
            ndim=1,
        )
        return fn.cast(text.gpu() if gpu else text, dtype=dali_types.INT64), fn.reductions.max(text)

    built = pipeline()
    with _without_main_module():
        built.build()
    return DALIGenericIterator([built], ["text", "largest"], auto_reset=True, prepare_first_batch=False)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep processes that are spawned meanwhile from importing the program again: readers need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _windows(dataset: GPTDataset | BlendedDataset) -> TokenWindows | BlendedWindows:
    """A data set of Megatron as what workers can be handed."""
    blended = isinstance(dataset, BlendedDataset)
    if (dataset.dataset_index if blended else dataset.shuffle_index) is None:
        dataset[0]  # --dataloader-defer-npy-index-mmap puts off the loading of indices until a sample is read
    if blended:
        return BlendedWindows(
            [_windows(part) for part in dataset.datasets], dataset.dataset_index, dataset.dataset_sample_index
        )
    prefix = dataset.dataset_path
    if is_object_storage_path(prefix):
        raise VirtualWidthError(f"--dataloader-type external maps files and {prefix} is none: choose single.")
    return TokenWindows(
        *map_sequences(prefix),
        dataset.document_index,
        dataset.sample_index,
        dataset.shuffle_index,
        dataset.config.sequence_length,
        dataset._pad_token_id,
    )

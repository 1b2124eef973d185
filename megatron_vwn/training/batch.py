"""Data and loss of a pre-training run: what Megatron's own training script has and its wheel lacks.

``pretrain()`` wants a provider of datasets and a forward step. Everything between them is Megatron's: GPTDataset and
its blends, the broadcast of a batch over tensor-parallel ranks, the slicing over context-parallel ranks. Documents are
packed head to tail into samples of ``--seq-length`` tokens.
"""

import argparse
import errno
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.dali import DaliLoader, data_loaders
from megatron_vwn.data.indexed import check_token_ids

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
# A loss ten times the largest so far is worth a second computation (--check-for-spiky-loss).
_SPIKE = 10

_straggler_detector = StragglerDetector()


def train_valid_test_datasets_provider(
    train_val_test_num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> list[torch.utils.data.Dataset | DaliLoader | None]:
    """Build the training, validation and test data that Megatron's flags describe; call it on every rank.

    Rank 0 builds the sample indices and writes them to --data-cache-path, or to PREFIX/cache; the other ranks wait for
    it and read them. A rank that needs no batch gets None. With --dataloader-type external the rank gets iterators.

    Args:
        train_val_test_num_samples: samples to provide; None for one epoch.
        vp_stage: virtual pipeline stage of this model chunk.

    Raises:
        VirtualWidthError: the indices cannot be written.
    """
    args = get_args()
    builder = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        train_val_test_num_samples,
        lambda: mpu.get_tensor_model_parallel_rank() == 0 and _needs_batch(vp_stage),
        _dataset_config(args, get_tokenizer()),
    )
    try:
        datasets = builder.build()
    except Exception as error:  # Megatron's own, around that of the system
        if not isinstance(error.__cause__, OSError):
            raise
        what, advice = "written", "give a folder that has room with --data-cache-path"
        if error.__cause__.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "give a folder that may be written to with --data-cache-path"
        if args.dataloader_fast_cache_load and isinstance(error.__cause__, FileNotFoundError):
            what, advice = "read", "run once without --dataloader-fast-cache-load, which makes them"
        raise VirtualWidthError(
            f"the sample indices of the data cannot be {what} ({error.__cause__}): {advice}."
        ) from error
    return data_loaders(args, datasets) if args.dataloader_type == "external" else datasets


# Every rank calls the provider, not only those of tensor-parallel rank 0.
train_valid_test_datasets_provider.is_distributed = True


def get_batch(
    data_iterator: Iterator | None, vp_stage: int | None = None, *, micro_batch_size: int | None = None
) -> dict[str, torch.Tensor | None]:
    """The next micro-batch, or what this rank needs of it.

    Args:
        data_iterator: read on tensor-parallel rank 0 of a stage that needs a batch, otherwise ignored.
        vp_stage: virtual pipeline stage of the model chunk.
        micro_batch_size: samples in the batch; None for --micro-batch-size. Evaluation may have another.

    Returns:
        The keys of ``BATCH_KEYS``. With s = --seq-length / context-parallel size, on the device: tokens, labels and
        position_ids [micro-batch, s] int64, loss_mask [micro-batch, s] fp32, attention_mask
        [micro-batch, 1, s, --seq-length] bool (True is masked) or None. The first stage has no labels and loss_mask,
        the last no tokens and position_ids unless it is also the first or predicts several tokens, those between
        nothing.

    Raises:
        VirtualWidthError: the batch has a token id beyond the tokenizer's.
    """
    if not _needs_batch(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        if not args.mock_data and args.dataloader_type != "external":  # whose loader looks for itself
            _check_ids(sample["tokens"], sample["labels"])
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size or args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_several_tokens(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {key: batch[key] for key in BATCH_KEYS}


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss of a micro-batch over the tokens of this rank; the training loop divides and averages.

    Args:
        loss_mask: [micro-batch, s] fp32, 0 where a token does not count.
        output_tensor: [micro-batch, s] loss per token in nats.

    Returns:
        The sum (fp32 scalar), the number of tokens that count (int32 scalar), and for the log under "lm loss" the fp32
        pair of both, which the training loop adds up over micro-batches, data- and context-parallel ranks.
    """
    weights = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * weights)
    num_tokens = weights.sum().to(torch.int)
    _validate_loss(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
    """Forward one micro-batch through a model chunk, as Megatron's schedules call it.

    Returns:
        The output of the chunk (loss per token on the last stage, hidden states before it) and its loss function.
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_detector(bdata=True):
        batch = get_batch(
            data_iterator,
            get_attr_wrapped_model(model, "vp_stage"),
            micro_batch_size=args.micro_batch_size if model.training else args.eval_micro_batch_size,
        )
    timers("batch-generator").stop()
    with _straggler_detector:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(loss_func, batch["loss_mask"])


def _needs_batch(vp_stage: int | None) -> bool:
    """Whether a model chunk embeds tokens or computes a loss."""
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    return first or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def _check_ids(*batches: torch.Tensor) -> None:
    """Refuse ids beyond the vocabulary, which would end on a GPU in a failed assertion, or train rows of padding."""
    smallest, largest = zip(*(torch.aminmax(batch) for batch in batches), strict=True)
    check_token_ids(int(min(smallest)), int(max(largest)), get_tokenizer().vocab_size, "a batch of the data")


def _predicts_several_tokens(vp_stage: int | None) -> bool:
    """Whether a model chunk embeds tokens for multi-token prediction, which a HybridModel puts on its last stage."""
    return mtp_on_this_rank(mtp_num_layers=get_args().mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def _dataset_config(args: argparse.Namespace, tokenizer: MegatronTokenizerBase) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=None if sequences is None else json.loads(Path(sequences).read_text()),
    )


def _validate_loss(loss: torch.Tensor) -> None:
    """Stop at a loss that is no number, and compute an unexpectedly large one twice, as far as the flags ask for it."""
    args, machine = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "found NaN in local forward loss calculation", True)]
        checks += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        checks += [(is_spike, "Spiky loss", False)]
    for reject, message, fatal in checks:
        # tolerance 0: a forward pass computed again must give the same bits.
        machine.validate_result(result=loss, rejection_func=reject, message=message, tolerance=0.0, fatal=fatal)

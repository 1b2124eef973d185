"""What is known to be wrong with the data of a run before the run starts.

Files are looked at by ``data.indexed``; here Megatron's flags are turned into the list of those files, and flags about
data that would be ignored, or end in an assertion deep inside Megatron, are refused.
"""

import argparse
import os
from pathlib import Path

from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.dali import check_dali
from megatron_vwn.data.indexed import (
    Description,
    check_indexed_dataset,
    check_token_ids,
    default_index_cache,
    read_description,
    token_range,
    vocabulary_fingerprint,
)
from megatron_vwn.training.ranks import first_of_all
from megatron_vwn.training.refusals.folders import first_that_exists

# Tokens of all data sets together that are looked at before a run: 64 MB, which take 0.1 s where they are in memory.
_LOOKED_AT = 1 << 24


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """Every local data set that a run reads, each once, in the order of the flags, without its weight in a blend.

    Object storage (s3:, msc:) is left out: its files cannot be looked at without a client and credentials.

    Args:
        args: Megatron's flags, parsed; they need not be validated.

    Raises:
        VirtualWidthError: when a list of data sets cannot be read.
    """
    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        source = args.data_args_path or args.per_split_data_args_path or "--data-path"
        reason = str(error) or "weights for some data sets only"
        raise VirtualWidthError(
            f"the list of data sets in {source} cannot be read ({reason}): give paths, or a weight before every path; "
            "a JSON file needs the keys train, valid and test."
        ) from None
    blends = [blend, *(blend_per_split or [])]
    prefixes = dict.fromkeys(prefix for each in blends if each is not None for prefix in each[0])
    return [prefix for prefix in prefixes if not is_object_storage_path(prefix)]


def check_data(args: argparse.Namespace) -> None:
    """Refuse, before anything is built, data that is missing or damaged and flags that this module does not honour.

    Args:
        args: Megatron's flags, parsed; they need not be validated.

    Raises:
        VirtualWidthError: the first fault.
    """
    _check_flags(args)
    prefixes = data_prefixes(args)
    for prefix in prefixes:
        check_indexed_dataset(prefix)
    if first_of_all() and not is_object_storage_path(args.data_cache_path or ""):  # it writes indices for all nodes
        _check_index_folders(args, prefixes)


def check_vocabularies(prefixes: list[str], tokenizer: MegatronTokenizerBase) -> None:
    """Refuse data that was tokenised with another vocabulary, as far as PREFIX.json and some tokens tell.

    Of all data together ``_LOOKED_AT`` tokens are read. An id that is missed there ends the run with the same sentence
    when it is met (``training.batch``).

    Raises:
        VirtualWidthError: the first fault.
    """
    for prefix in prefixes:
        check_vocabulary(prefix, tokenizer, _LOOKED_AT // len(prefixes))


def check_vocabulary(prefix: str, tokenizer: MegatronTokenizerBase, most: int = _LOOKED_AT) -> None:
    """Refuse a data set that was tokenised with another vocabulary than the run's.

    The tokenizer may have further tokens behind those that the data was prepared with.

    Args:
        prefix: path without the suffix; has passed ``check_indexed_dataset``.
        tokenizer: of the run.
        most: tokens to look at.

    Raises:
        VirtualWidthError: when sizes, tokens or the end of document differ, or an id is beyond the vocabulary.
    """
    description = read_description(prefix)
    if description is not None:
        _check_description(prefix, description, tokenizer)
    check_token_ids(*token_range(prefix, most), tokenizer.vocab_size, prefix)


def _check_description(prefix: str, description: Description, tokenizer: MegatronTokenizerBase) -> None:
    if description.vocabulary_size > tokenizer.vocab_size:
        raise VirtualWidthError(
            f"{prefix} was tokenised with {description.vocabulary_size:,} tokens and the tokenizer of this run has "
            f"{tokenizer.vocab_size:,}: give the tokenizer that the data was prepared with."
        )
    try:
        vocabulary = tokenizer.inv_vocab
    except (AttributeError, NotImplementedError):  # NullTokenizer knows ids and no tokens
        return
    known = {token_id: token for token_id, token in vocabulary.items() if token_id < description.vocabulary_size}
    same = vocabulary_fingerprint(known) == description.vocabulary_sha256
    if not same or tokenizer.eod != description.end_of_document:
        raise VirtualWidthError(
            f"{prefix} was tokenised with another vocabulary than that of --tokenizer-model: give the tokenizer that "
            "the data was prepared with."
        )


def _check_index_folders(args: argparse.Namespace, prefixes: list[str]) -> None:
    """Refuse a folder for sample indices that has none and cannot be written to."""
    own = args.data_cache_path
    for folder in [Path(own)] if own else map(default_index_cache, prefixes):
        there = first_that_exists(folder)
        if not os.access(there, os.W_OK | os.X_OK) and not any(folder.glob("*-description.txt")):
            raise VirtualWidthError(
                f"sample indices have no place, because nothing may be written to {there}: give "
                f"{'another' if own else 'a'} folder with --data-cache-path."
            )


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags about data that would be ignored, or end in an assertion deep inside Megatron."""
    for name, advice in (
        ("dataloader_inter_document_masking", "packs sequences, which this entry point does not do: drop it."),
        ("hybrid_context_parallel", "needs samples of several lengths, which this entry point does not make: drop it."),
    ):
        if getattr(args, name):
            raise VirtualWidthError(f"--{name.replace('_', '-')} {advice}")
    fused = args.transformer_impl != "local" or args.masked_softmax_fusion
    if args.reset_attention_mask and (fused or not args.create_attention_mask_in_dataloader):
        raise VirtualWidthError(
            "--reset-attention-mask has no effect on fused causal attention: drop it, or give --transformer-impl local "
            "with --no-masked-softmax-fusion and without --no-create-attention-mask-in-dataloader."
        )
    if args.dataloader_type == "external":
        check_dali(args)
    one_blend = args.data_path is not None or args.data_args_path is not None
    per_split = args.per_split_data_args_path is not None or any(
        path is not None for path in (args.train_data_path, args.valid_data_path, args.test_data_path)
    )
    if one_blend + per_split + args.mock_data != 1:
        raise VirtualWidthError(
            "give exactly one source of data: --data-path or --data-args-path, or --train-data-path with "
            "--valid-data-path (or --per-split-data-args-path), or --mock-data."
        )
    if per_split and args.split is not None:
        raise VirtualWidthError("--split divides one data set and contradicts data given per split: drop --split.")
    if args.data_args_path is not None and args.split is None:
        raise VirtualWidthError("--data-args-path needs --split, such as --split 990,10,0.")
    if args.full_validation != args.multiple_validation_sets:
        raise VirtualWidthError(
            "Megatron 0.19 runs --full-validation and --multiple-validation-sets only together, also with a single "
            "validation set: give both or neither."
        )
    if args.full_validation and (args.eval_micro_batch_size or args.micro_batch_size) != 1:
        raise VirtualWidthError("--full-validation reads one sample at a time: add --eval-micro-batch-size 1.")

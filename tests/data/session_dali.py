"""Ranks iterate over the same data with Megatron's loader and with DALI; test_dali_data.py looks at what differed.

Usage: torchrun session_dali.py FOLDER PREFIX OTHER_PREFIX MEGATRON_FLAGS. Every rank writes FOLDER/rank<R>.json: per
case the number of compared batches by split, and the first difference or null.
"""

# ruff: noqa: E402

import itertools
import json
import sys
from pathlib import Path

import megatron_vwn.cpu

assert megatron_vwn.cpu.install()

import torch
from megatron.core import mpu
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import get_tokenizer, set_global_variables
from megatron.training.training import build_train_valid_test_data_iterators

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.batch import BATCH_KEYS, train_valid_test_datasets_provider

# More than any split has: the end of the shorter loader would show. Whole validation sets are read round and round.
MOST_BATCHES = 1000
ROUNDS_OF_VALIDATION = 3
RESUMED = {"iteration": 100, "consumed_train_samples": 100 * 8, "consumed_valid_samples": 10 * 2 * 8}
RESETS = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
WHOLE = {"full_validation": True, "multiple_validation_sets": True, "eval_micro_batch_size": 1}
DEFERRED = {"dataloader_fast_cache_load": True, "dataloader_defer_npy_index_mmap": True}
BLEND = {"blend": True}
# What changes in the flags, and the processes that read for DALI.
CASES = {
    "two data-parallel ranks": ({}, 2),
    "one data-parallel rank": ({"tensor_model_parallel_size": 2}, 0),
    "pipeline stages": ({"pipeline_model_parallel_size": 2}, 0),
    "blend": (BLEND, 0),
    "resumed": (RESUMED, 0),
    "blend, resumed": (BLEND | RESUMED, 1),
    "resets": (BLEND | RESETS, 0),
    "no attention mask": ({"create_attention_mask_in_dataloader": False, "eod_mask_loss": True}, 0),
    "a pad token in the text": ({"pad": 7} | RESETS, 0),
    "deferred indices": (BLEND | DEFERRED, 0),
    "whole validation sets": (BLEND | WHOLE, 0),
    "evaluation alone": ({"skip_train": True} | RESUMED, 0),
}


def iterators(args, loader, workers):
    """Training, validation (one or several) and test data as Megatron's training loop gets them."""
    args.dataloader_type, args.num_workers = loader, workers
    train, valid, test = build_train_valid_test_data_iterators(train_valid_test_datasets_provider)
    several = {f"valid{number}": each for number, each in enumerate(valid)} if isinstance(valid, list) else {}
    return {"train": train, "test": test} | (several or {"valid": valid})


def difference(batch, expected):
    """The first key whose tensors are not the same bits in the same layout."""
    for key in BATCH_KEYS:
        one, other = batch.get(key), expected.get(key)
        if (one is None) != (other is None):
            return f"{key} is there once only"
        if one is None:
            continue
        if (one.dtype, one.shape, one.stride()) != (other.dtype, other.shape, other.stride()):
            return f"{key}: {one.dtype} {one.shape} {one.stride()}, not {other.dtype} {other.shape} {other.stride()}"
        if not torch.equal(one, other):
            return f"{key}: {one.tolist()} instead of {other.tolist()}"[:1000]
    return None


def compare(batches, expected, most):
    """The number of batches, the first difference, and the labels of the first batch."""
    first = None
    for number in range(most):
        one, other = next(batches, None), next(expected, None)
        if one is None and other is None:
            return number, None, first
        if one is None or other is None:
            return number, "one loader ends before the other", first
        if found := difference(one, other):
            return number, f"batch {number}: {found}", first
        first = first or other["labels"].tolist()
    return most, None, first


def case(args, prefixes, changes, workers):
    """All splits of one case."""
    blend = changes.get("blend")
    args.train_data_path = ["0.3", prefixes[0], "0.7", prefixes[1]] if blend else prefixes[:1]
    args.valid_data_path = prefixes if blend else prefixes[:1]
    args.test_data_path = prefixes[1:]
    get_tokenizer()._tokenizer._pad_id = changes.get("pad", -1)
    whole = changes.get("full_validation")
    kept = dict(vars(args))
    vars(args).update({name: value for name, value in changes.items() if name in kept})
    mpu.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    expected = iterators(args, "single", 0)
    lengths = args.eval_iters
    args.eval_iters = kept["eval_iters"]
    imported = "nvidia.dali" in sys.modules
    actual = iterators(args, "external", workers)
    result = {"imported": imported, "eval_iters": [lengths, args.eval_iters], "rank": mpu.get_data_parallel_rank()}
    assert actual.keys() == expected.keys()
    for split in actual:
        if actual[split] is None or expected[split] is None:
            result[split] = None if actual[split] is expected[split] else "a rank reads with one loader only"
            continue
        most = ROUNDS_OF_VALIDATION * max(lengths) if whole and split.startswith("valid") else MOST_BATCHES
        result[split] = compare(iter_of(actual[split]), iter_of(expected[split]), most)
    mpu.destroy_model_parallel()
    vars(args).clear()
    vars(args).update(kept)
    return result


def beyond(args, prefixes):
    """What ends a run whose tokenizer knows fewer tokens than the data."""
    get_tokenizer()._tokenizer._vocab_size = 20
    args.train_data_path = args.valid_data_path = args.test_data_path = prefixes[:1]
    mpu.initialize_model_parallel()
    data = iterators(args, "external", 0)["train"]
    try:
        return next(data) and None
    except VirtualWidthError as refusal:
        return str(refusal)


def iter_of(iterator):
    """RerunDataIterator has a next and no iter."""
    return itertools.chain.from_iterable(iter(lambda: [next(iterator)], None))


def main():
    folder, *prefixes = sys.argv[1:4]
    sys.argv[1:] = sys.argv[4:]
    args = parse_args()
    args.rank, args.world_size, args.iteration = torch.distributed.get_rank(), 2, 0
    validate_args(args)
    set_global_variables(args)
    results = {name: case(args, prefixes, *settings) for name, settings in CASES.items()}
    results["beyond"] = beyond(args, prefixes)
    results["imported"] = results["two data-parallel ranks"]["imported"]
    Path(folder, f"rank{args.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main()
    torch.distributed.destroy_process_group()

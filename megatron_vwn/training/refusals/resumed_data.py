"""What a resumed run changes of the data that its checkpoint was trained on.

Megatron skips as many samples as were consumed: in another order some come again and others never. That may be meant,
as with a new mixture, so nothing is refused and all of it is said. Files that were exchanged under their names are not
noticed, and a longer run, whose further epochs are shuffled with the others, is named with the schedule.
"""

import argparse
from itertools import zip_longest

from megatron_vwn.training.refusals.checkpoint import Checkpoint

# Which files, which samples of them and in which order.
_SAMPLES = """
seed data_path data_args_path train_data_path valid_data_path test_data_path per_split_data_args_path mock_data split
dataloader_type phase_transition_iterations mid_level_dataset_surplus full_validation
"""
# What the token ids mean, and what is computed from them: neither is a field of the model, which ``function`` compares.
_TOKENS = """
tokenizer_type tokenizer_model vocab_file merge_file vocab_size metadata_path special_tokens tiktoken_pattern
tiktoken_num_special_tokens null_tokenizer_eod_id null_tokenizer_pad_id
reset_position_ids reset_attention_mask eod_mask_loss allow_ambiguous_pad_tokens
"""
COMPARED = (*_SAMPLES.split(), *_TOKENS.split())
# The cyclic loader shuffles what each rank has by itself; the others deal one order to any number of ranks.
CYCLIC = ("micro_batch_size", "data_parallel_size", "data_sharding")
# Arguments that are typed by another name than their own, or not at all.
_NAMES = {
    "metadata_path": "--tokenizer-metadata",
    "special_tokens": "--tokenizer-special-tokens",
    "data_parallel_size": "data-parallel ranks",
    "data_sharding": "data sharding",
}
# Characters; a blend of many data sets is longer, and only its first difference is said.
_LONG = 400


def changed_data(checkpoint: Checkpoint, args: argparse.Namespace) -> list[str]:
    """What a run changes of the checkpoint's data, each in words; nothing where it begins anew.

    Args:
        checkpoint: what training starts from.
        args: Megatron's arguments, validated.
    """
    if checkpoint.args is None or checkpoint.weights_alone(args):
        return []
    theirs, ours = _settings(checkpoint.completed_args(args)), _settings(args)
    # Only one of them may be cyclic and have its further settings: the loader's type is said, which is enough.
    return [_words(name, theirs[name], now) for name, now in ours.items() if theirs.get(name, now) != now]


def _settings(args: argparse.Namespace) -> dict[str, object]:
    names = (*COMPARED, *CYCLIC) if args.dataloader_type == "cyclic" else COMPARED
    found = {name: getattr(args, name) for name in names}
    if args.dataloader_type == "external":  # DALI reads the samples of single in its order
        found["dataloader_type"] = "single"
    return found


def _words(name: str, before: object, now: object) -> str:
    flag = _NAMES.get(name, f"--{name.replace('_', '-')}")
    if isinstance(before, list) and isinstance(now, list) and len(_typed(before) + _typed(now)) > _LONG:
        number, pair = next(each for each in enumerate(zip_longest(before, now), 1) if each[1][0] != each[1][1])
        return f"{flag} of {len(before)} -> {len(now)} words, the first that differs is no. {number}: {_arrow(*pair)}"
    return f"{flag} {_arrow(_typed(before), _typed(now))}"


def _arrow(before: object, now: object) -> str:
    return f"{before} -> {now}"


def _typed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

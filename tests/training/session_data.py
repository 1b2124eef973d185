"""Two ranks read prepared data in every layout that two ranks allow; test_data.py looks at what they saw.

Usage: session_data.py FOLDER PREFIX OTHER_PREFIX MEGATRON_FLAGS. Every rank writes FOLDER/rank<R>.json.
"""

# ruff: noqa: E402

import json
import sys
from pathlib import Path

import megatron_vwn.cpu

assert megatron_vwn.cpu.install()

import torch
from megatron.core import mpu
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import get_tokenizer, set_global_variables

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.batch import BATCH_KEYS, forward_step, get_batch, train_valid_test_datasets_provider
from megatron_vwn.training.refusals.data import check_vocabulary

SEQUENCE = 16
LAYOUTS = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "pipeline_mtp": {"pipeline_model_parallel_size": 2, "mtp_num_layers": 1},
    "interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


class Model(torch.nn.Module):
    """Answers its labels as losses per token, so that sums can be foretold."""

    vp_stage = None

    def forward(self, tokens, position_ids, attention_mask, labels, loss_mask):
        self.seen = list(tokens.shape)
        return labels.float()


def batches(dataset, size):
    """Micro-batches of a dataset in its own order, as a data loader makes them; None where a rank has no dataset."""
    return None if dataset is None else iter(torch.utils.data.DataLoader(dataset, batch_size=size))


def as_lists(batch):
    return {key: value if value is None else value.tolist() for key, value in batch.items()}


def layout(args, sizes):
    """What this rank sees in one layout: which datasets it has, and a batch of the training data per model chunk."""
    for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"):
        setattr(args, name, sizes.get(name, 1))
    args.mtp_num_layers = sizes.get("mtp_num_layers")
    chunks = sizes.get("virtual_pipeline_model_parallel_size")
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        chunks,
        context_parallel_size=args.context_parallel_size,
    )
    seen = []
    for vp_stage in range(chunks) if chunks else [None]:
        train, valid, test = train_valid_test_datasets_provider((40, 4, 0), vp_stage=vp_stage)
        batch = get_batch(batches(train, args.micro_batch_size), vp_stage)
        has = {"train": train is not None, "valid": valid is not None, "test": test is not None}
        seen.append({"has": has, "batch": as_lists(batch)})
    result = {"chunks": seen}
    if args.pipeline_model_parallel_size == 1:
        model, steps = Model(), {}
        for mode, dataset in (("training", train), ("evaluation", valid)):
            size = args.micro_batch_size if mode == "training" else args.eval_micro_batch_size
            output, loss_func = forward_step(batches(dataset, size), model.train(mode == "training"))
            loss, num_tokens, report = loss_func(output)
            steps[mode] = {
                "shape": model.seen,
                "loss": loss.item(),
                "dtypes": [str(loss.dtype), str(num_tokens.dtype)],
                "num_tokens": num_tokens.item(),
                "report": report["lm loss"].tolist(),
                "labels": output.tolist(),
            }
        result["steps"] = steps
    if not sizes:
        # Ids that the table, which is filled up, has rows for, but the tokenizer has no tokens.
        size = get_tokenizer().vocab_size
        batch = {key: torch.full((args.micro_batch_size, SEQUENCE), size - 1) for key in BATCH_KEYS[:4]}
        late = {"labels": batch["labels"] + (torch.arange(SEQUENCE) == SEQUENCE - 1)}
        result["beyond"] = [refusal(get_batch, iter([each])) for each in (batch, batch | late)]
    mpu.destroy_model_parallel()
    return result


def refusal(call, *arguments):
    try:
        call(*arguments)
    except VirtualWidthError as error:
        return str(error)
    return None


def main():
    folder, prefix, other_prefix, *flags = sys.argv[1:]
    sys.argv[1:] = flags
    args = parse_args()
    args.rank, args.world_size = int(torch.distributed.get_rank()), 2
    validate_args(args)
    set_global_variables(args)
    results = {name: layout(args, sizes) for name, sizes in LAYOUTS.items()}
    results["vocabulary"] = refusal(check_vocabulary, prefix, get_tokenizer())
    results["other vocabulary"] = refusal(check_vocabulary, other_prefix, get_tokenizer())
    Path(folder, f"rank{args.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main()
    torch.distributed.destroy_process_group()

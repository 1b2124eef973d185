"""What a variant of a study costs: parameters and FLOPs per token, from its command line.

A process of its own, because it imports Megatron (``python -m megatron_vwn.study.count``): it reads command
lines by name as JSON and prints what ``count`` returns.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence

from megatron_vwn.config import VirtualWidthError

_MARK = "counted: "


def count(commands: Mapping[str, Sequence[str]], ranks: int) -> dict[str, dict]:
    """Count each command line's model.

    Args:
        commands: flags of the training program by name of a variant.
        ranks: processes of a run.

    Returns:
        By name either "flops_per_token" (matrix products, forward and backward: the backbone's as Megatron counts them,
        a virtual width's by ``megatron_lm.estimates.added_flops``), "parameters" and "trunk_parameters" (without
        further predictions), or "unknown" with the reason; all of them unknown where Megatron cannot be imported.
    """
    program = [sys.executable, "-W", "ignore", "-m", "megatron_vwn.study.count"]
    asked = json.dumps({"commands": {name: list(words) for name, words in commands.items()}, "ranks": ranks})
    done = subprocess.run(program, input=asked, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return {name: {"unknown": reason} for name in commands}


def _count_one(words: list[str], ranks: int) -> dict[str, object]:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.training import num_floating_point_operations

    from megatron_vwn.megatron_lm.estimates import added_flops
    from megatron_vwn.planner.simulated_world import simulated_world
    from megatron_vwn.training.run import parse_flags

    args, _ = parse_flags(words)
    if args.padded_vocab_size is None:
        build_tokenizer(args)
        words = [*words, "--padded-vocab-size", str(args.padded_vocab_size)]
    with simulated_world(words, ranks) as world:
        tokens = world.args.global_batch_size * world.args.seq_length
        backbone = num_floating_point_operations(world.args, world.args.global_batch_size) / tokens
        flops, whole = backbone + added_flops(world.args), world.count()
    return {"flops_per_token": flops, "parameters": whole.total, "trunk_parameters": whole.trunk}


def _main() -> None:
    asked = json.load(sys.stdin)
    logging.disable(logging.WARNING)
    from megatron_vwn import cpu

    cpu.install(announce=False)
    answers = {}
    for name, words in asked["commands"].items():
        try:
            answers[name] = _count_one(words, asked["ranks"])
        except (VirtualWidthError, ValueError, AssertionError, AttributeError, OSError, TypeError) as error:
            answers[name] = {"unknown": " ".join(str(error).split()) or type(error).__name__}
    print(f"\n{_MARK}{json.dumps(answers)}", flush=True)


if __name__ == "__main__":
    _main()

"""``python -m megatron_vwn.benchmark.huggingface``: the Hugging Face model against a Llama of its backbone, on a CPU.

Both run in turn in one process, on one thread and its own CPU time, so that a busy machine slows both alike. Prefill is
one forward pass with a cache whose head sees the last token alone, as in ``generate``; decoding is greedy ``generate``.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatron_vwn import atomic
from megatron_vwn.benchmark import machine
from megatron_vwn.benchmark.timing import Timed, interleave
from megatron_vwn.hf import VWNConfig, VWNForCausalLM


class ProcessClock:
    """CPU time of this process: what others do meanwhile counts little."""

    def seconds(self, timed: Timed, number: int) -> float:
        """One sample."""
        start = time.process_time()
        timed.call(timed.prepare(number))
        return time.process_time() - start


def build(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """Both models, every parameter away from its initial value."""
    shared = {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.prompt + args.new_tokens + 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, **shared))
    vwn = VWNForCausalLM(VWNConfig(hybrid_pattern="*-" * args.layers, vwn_m=args.m, vwn_n=args.n, **shared))
    for parameter in (*llama.parameters(), *vwn.parameters()):
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    dtype = getattr(torch, args.dtype)
    return {"Llama": llama.to(dtype).eval(), "VWN": vwn.to(dtype).eval()}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second of prefill and decoding by each model, medians of all rounds, and VWN's part of Llama's."""
    models = build(args)
    prompt = torch.randint(args.vocab_size, (1, args.prompt))
    start, new = prompt[:, :8], {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    calls = {
        "prefill": lambda model: model(prompt, use_cache=True, logits_to_keep=1),
        "decode": lambda model: model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, **new),
    }
    tokens = {"prefill": args.prompt, "decode": args.new_tokens}
    variants = {
        (what, name): Timed(lambda _, call=call, model=model: call(model))
        for what, call in calls.items()
        for name, model in models.items()
    }
    spreads = interleave(variants, ProcessClock(), sets=1, warmup=1, rounds=args.rounds)
    rates = {what: {name: tokens[what] / spreads[what, name].median for name in models} for what in calls}
    return {what: {**rate, "ratio": rate["VWN"] / rate["Llama"]} for what, rate in rates.items()}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser("python -m megatron_vwn.benchmark.huggingface", description=__doc__)
    sizes = {"m": 4, "n": 16, "layers": 8, "hidden-size": 512, "intermediate-size": 1408, "heads": 8}
    sizes |= {"vocab-size": 32000, "prompt": 512, "new-tokens": 64, "rounds": 15, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rates = measure(args)
    for what, rate in rates.items():
        print(f"{what:7}  " + "  ".join(f"{name} {value:8.3f}" for name, value in rate.items()))
    cpu, versions, load = torch.device("cpu"), machine.versions(), os.getloadavg()
    print(f"{machine.device_name(cpu)}, load {load[0]:.1f}, {versions}")
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        facts = {"hardware": machine.hardware(cpu), "load": load, "versions": versions, "commit": machine.commit()}
        atomic.write_json(args.json, {"settings": sizes, "tokens_per_second": rates, **facts})
    return 0


if __name__ == "__main__":
    sys.exit(main())

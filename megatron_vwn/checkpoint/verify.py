"""Whether a Megatron checkpoint and a Hugging Face folder compute the same: both are run on the same prompts.

    python -m megatron_vwn.checkpoint.verify MEGATRON FOLDER

A program of its own, which ``vwn-convert --verify`` starts: Megatron's model needs process groups and, without a GPU,
the emulation, which must come before the first import of Megatron. Nothing of the converter is used but its names, and
which rows are tokens: the model is built from the run's arguments and loaded by Megatron, in one process.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.extensions.transformer_engine import HAVE_TE  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from megatron_vwn.checkpoint import mapping  # noqa: E402
from megatron_vwn.checkpoint.torch_dist import TorchDistReader  # noqa: E402
from megatron_vwn.checkpoint.vocabulary import tokens_of  # noqa: E402
from megatron_vwn.cli import DIFFERENT, exit_code, progress_bar  # noqa: E402
from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.hf import VWNConfig  # noqa: E402
from megatron_vwn.hf.modeling_vwn import VWNRouter  # noqa: E402
from megatron_vwn.training.flags.defaults import megatron_defaults  # noqa: E402
from megatron_vwn.training.flags.vwn import virtual_width_from_args  # noqa: E402
from megatron_vwn.training.model import VirtualWidthModelBuilder, model_config_from_args  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Of the norm of the difference over the norm of Megatron's logits: rounding in another order."""

_TEXTS = (
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "def main(argv):\n    return 0\n",
    "1, 2, 3, 5, 8, 13, 21,",
)
_RANDOM_PROMPTS, _LONGEST = 3, 64
# A choice of experts near a tie is decided by rounding: in half precision such tokens are left out, as long as others
# remain. The same tensors in fp32 leave no such doubt, and are compared too.
_FEWEST_TOKENS = 8

# What the run did for its layout, its speed or its training, undone: one process, no noise, no dropped tokens.
_ALONE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "microbatch_group_size_per_vp_stage": None,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "overlap_p2p_comm": False,
    "overlap_p2p_comm_warmup_flush": False,
    "tp_comm_overlap": False,
    "delay_wgrad_compute": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    "deterministic_mode": False,
    "calculate_per_token_loss": False,
    "fp8": None,
    "fp4": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_swiglu_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "use_fused_weighted_squared_relu": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_expert_rank_capacity_factor": None,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "moe_shared_expert_overlap": False,
    "moe_layer_recompute": False,
    "moe_enable_deepep": False,
    "moe_per_layer_logging": False,
    "vwn_partition": None,
    "vwn_recompute_block": None,
    "vwn_kernels": "torch",
}
_ALONE_WITHOUT_TRANSFORMER_ENGINE = {
    "transformer_impl": "local",
    "attention_backend": AttnBackend.auto,
    "moe_grouped_gemm": False,
    "use_te_activation_func": False,
    "use_grouped_gemm_for_shared_expert": False,
    "batch_invariant_mode": False,
    "symmetric_ar_type": None,
}


@dataclass(frozen=True)
class Difference:
    """Of one kind of logits over all prompts."""

    what: str
    relative: float
    largest: float
    worst: str
    tokens: int
    compared: int


@dataclass(frozen=True)
class _Output:
    """What a model says about one prompt: logits [tokens, vocabulary without padding] of the next token and of each
    further one, and which experts every token took, [layers, tokens, experts]."""

    logits: list[Tensor]
    experts: Tensor | None


def main(argv: list[str] | None = None) -> int:
    """Compare and print; returns 0 for the same function, 3 for another, 2 where one of them cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vwn.checkpoint.verify", description=__doc__.splitlines()[0]
    )
    parser.add_argument("megatron", type=Path)
    parser.add_argument("hugging_face", type=Path)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    disable_progress_bar()
    return exit_code("verify", lambda: 0 if compare(options.megatron, options.hugging_face) else DIFFERENT)


@torch.no_grad()
def compare(megatron: Path, hugging_face: Path) -> bool:
    """Run both in the checkpoint's precision and in fp32, and print the differences.

    Returns:
        Whether all of them are within TOLERANCE, of models with the same tokens.
    """
    reader = TorchDistReader(megatron)
    config = AutoConfig.from_pretrained(hugging_face, trust_remote_code=False)
    if config.vocab_size != (tokens := tokens_of(reader.arguments)):
        print(f"the folder has {config.vocab_size} tokens, the checkpoint {tokens} (BEYOND any tolerance)", flush=True)
        return False
    prompts = _prompts(hugging_face, config)
    own = reader.tensors["embedding.word_embeddings.weight"].dtype
    same = True
    programs = {
        "Megatron": lambda dtype: _run_megatron(reader, config, prompts, dtype),
        "Hugging Face": lambda dtype: _run_hugging_face(hugging_face, prompts, dtype),
    }
    steps = [(dtype, name) for dtype in dict.fromkeys((own, torch.float32)) for name in programs]
    outputs = {}
    with _one_process():
        for dtype, name in progress_bar(steps, "verify", "model", lambda step: f"{step[1]} in {_short(step[0])}"):
            outputs[name] = programs[name](dtype)
            if name == "Hugging Face":
                for difference in _differences(outputs[name], outputs["Megatron"], dtype):
                    same &= _print(difference, dtype)
    return same


# ---------------------------------------------------------------------------------------------- prompts


def _prompts(folder: Path, config: VWNConfig) -> list[Tensor]:
    """Token ids [1, tokens] of a few texts, or random ones where there is no tokenizer."""
    longest = min(_LONGEST, config.max_position_embeddings)
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found = [tokenizer(text, return_tensors="pt").input_ids[:, :longest] for text in _TEXTS]
        return [ids.long() for ids in found if ids.shape[1] > 1]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (1, longest), generator=generator) for _ in range(_RANDOM_PROMPTS)]


# ---------------------------------------------------------------------------------------------- Megatron


class _one_process:
    """Process groups of this process alone."""

    def __enter__(self) -> None:
        os.environ.setdefault("RANK", "0")
        gpu = not megatron_vwn.cpu.install()
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)

    def __exit__(self, *_) -> None:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _run_megatron(
    reader: TorchDistReader, config: VWNConfig, prompts: list[Tensor], dtype: torch.dtype
) -> list[_Output]:
    model = _megatron_model(reader.arguments, dtype)
    _load(model, reader, config)
    head: list[Tensor] = []
    rows = config.vocab_size  # those behind them pad
    # Cloned: losses of further predictions are computed in place. They come before the next token's.
    model.output_layer.register_forward_hook(lambda _, __, out: head.append(out[0][:, 0, :rows].float().cpu().clone()))
    routing = _record(model, TopKRouter, lambda output: output[1].bool().cpu())
    outputs = []
    for tokens in prompts:
        size = tokens.shape[1]
        mask = torch.triu(torch.ones(1, 1, size, size, dtype=torch.bool), 1)
        model(tokens.cuda(), torch.arange(size)[None].cuda(), mask.cuda())
        *further, next_token = head
        outputs.append(_Output([next_token, *further], torch.stack(routing) if routing else None))
        head.clear()
        routing.clear()
    return outputs


def _megatron_model(saved: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    changed = dict(_ALONE)
    gpu = not megatron_vwn.cpu.install()
    if not (HAVE_TE and gpu):
        changed |= _ALONE_WITHOUT_TRANSFORMER_ENGINE
    changed |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "params_dtype": dtype}
    # Initial values cost time and are overwritten.
    changed |= {"use_cpu_initialization": not gpu, "perform_initialization": False}
    pattern = saved.hybrid_layer_pattern or saved.hybrid_override_pattern
    changed["hybrid_layer_pattern"] = pattern.replace("|", "")
    changed["num_layers"] = len(changed["hybrid_layer_pattern"].split("/")[0])
    changed["mtp_num_layers"] = pattern.count("/") or None
    args = argparse.Namespace(**(megatron_defaults() | vars(saved) | changed))
    model_config = model_config_from_args(args, virtual_width_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = VirtualWidthModelBuilder(model_config).build_model(groups).to(dtype)
    for module in model.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    return model.cuda().eval()


def _load(model: nn.Module, reader: TorchDistReader, config: VWNConfig) -> None:
    """Through Megatron's own loading. Pre-norms are looked for where the run's backend put them."""
    state = model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group(True)})
    state = {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}
    for key, value in state.items():
        if isinstance(value, ShardedTensor) and value.key not in reader.tensors:
            (hf_key,) = mapping.hf_keys(value.key, config)
            names = [mapping.megatron_key(hf_key, config, transformer_engine=engine) for engine in (True, False)]
            found = [name for name in names if name in reader.tensors]
            if not found:
                raise VirtualWidthError(f"{reader.folder} lacks {value.key}.")
            state[key] = replace(value, key=found[0])
    model.load_state_dict(dist_checkpointing.load(state, str(reader.folder)), strict=False)


# ---------------------------------------------------------------------------------------------- Hugging Face


def _run_hugging_face(folder: Path, prompts: list[Tensor], dtype: torch.dtype) -> list[_Output]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
    if megatron_vwn.cpu.install() is False:
        model = model.cuda()
    # Which experts, as Megatron has it.
    routing = _record(
        model, VWNRouter, lambda output: torch.zeros_like(output[0], dtype=torch.bool).scatter(1, output[2], True).cpu()
    )
    outputs = []
    for tokens in prompts:
        tokens = tokens.to(model.device)
        logits = [model(tokens).logits]
        if model.config.num_mtp_layers:
            routing.clear()  # mtp_logits runs the trunk once more
            logits += model.mtp_logits(tokens)
        outputs.append(_Output([entry[0].float().cpu() for entry in logits], torch.stack(routing) if routing else None))
        routing.clear()
    return outputs


def _record(model: nn.Module, kind: type[nn.Module], what) -> list[Tensor]:
    """The list to which every call of a module of this kind appends something of its output."""
    calls: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _, __, output: calls.append(what(output)))
    return calls


# ---------------------------------------------------------------------------------------------- differences


def _differences(actual: list[_Output], expected: list[_Output], dtype: torch.dtype) -> list[Difference]:
    found = []
    for kind in range(len(expected[0].logits)):
        a = torch.cat([output.logits[kind] for output in actual])
        e = torch.cat([output.logits[kind] for output in expected])
        names = [f"prompt {p}, position {t}" for p, out in enumerate(expected) for t in range(len(out.logits[kind]))]
        kept = torch.ones(len(e), dtype=torch.bool)
        if dtype != torch.float32 and expected[0].experts is not None:
            kept = torch.cat([(x.experts == y.experts).all(-1).all(0) for x, y in zip(actual, expected, strict=True)])
        errors = (a - e)[kept]
        largest = errors.abs().amax(-1)
        found.append(
            Difference(
                what="next token" if kind == 0 else f"further token {kind}",
                relative=(errors.norm() / e[kept].norm()).item() if kept.any() else 0.0,
                largest=largest.max().item() if kept.any() else 0.0,
                worst=names[kept.nonzero()[largest.argmax()].item()] if kept.any() else "none",
                tokens=len(e),
                compared=int(kept.sum()),
            )
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print(difference: Difference, dtype: torch.dtype) -> bool:
    tolerance = TOLERANCE[dtype]
    enough = difference.compared >= min(_FEWEST_TOKENS, difference.tokens) or dtype == torch.float32
    # A comparison with nan is false.
    same = not enough or difference.relative <= tolerance
    verdict = f"{'within' if same else 'BEYOND'} {tolerance:g}" if enough else "too few to compare"
    tokens = f"{difference.tokens} tokens"
    if difference.compared < difference.tokens:
        tokens = f"{difference.compared} of {tokens}, whose experts agree"
    print(
        f"logits of the {difference.what}, {_short(dtype)}, {tokens}: norm-relative difference "
        f"{difference.relative:.2e} ({verdict}), largest {difference.largest:.2e} at {difference.worst}",
        flush=True,
    )
    return same


if __name__ == "__main__":
    sys.exit(main())

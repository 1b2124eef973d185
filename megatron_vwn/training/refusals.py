"""What this entry point cannot run, decided from the parsed flags before anything is built.

A flag of Megatron either works or is refused here with a sentence that says what to change; none is silently ignored.
The rules are rows of a table, in the order in which a user would want to hear of them. What Megatron refuses by itself
stays Megatron's; rows repeat one of its assertions only where the virtual width gives a better sentence.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.hybrid.hybrid_layer_allocation import (
    Symbols,
    get_hybrid_total_layer_count,
    get_hybrid_total_pipeline_segment_count,
)

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError

Args = argparse.Namespace
_LOCAL_SYMBOLS = {Symbols.ATTENTION, Symbols.MLP, Symbols.MOE, Symbols.PIPE, Symbols.MTP_SEPARATOR}


@dataclass(frozen=True)
class Refusal:
    """One rule: whether it applies to parsed (not yet validated) flags, and the sentence that is then printed."""

    applies: Callable[[Args], object]
    sentence: str


def _flag(name: str, sentence: str) -> Refusal:
    """A rule about one flag that must stay unset; ``sentence`` follows the flag's name."""
    flag = f"--{name.replace('_', '-')}"
    return Refusal(lambda args: getattr(args, name, None), f"{flag} {sentence}")


def _pattern(args: Args) -> str:
    return args.hybrid_layer_pattern or args.hybrid_override_pattern or ""


def _depths(args: Args) -> int:
    """Further predictions in the pattern."""
    return _pattern(args).count(Symbols.MTP_SEPARATOR)


def _interleaved_without_overlap(args: Args) -> bool:
    stages = args.pipeline_model_parallel_size
    return not args.overlap_p2p_comm and stages == 2 < get_hybrid_total_pipeline_segment_count(_pattern(args))


# For every run, the ordinary model included.
_ALWAYS = (
    Refusal(
        lambda args: args.use_checkpoint_args and not (args.load or args.pretrained_checkpoint),
        "--use-checkpoint-args takes them from a checkpoint: add --load.",
    ),
    Refusal(
        lambda args: not _pattern(args),
        "--hybrid-layer-pattern is missing: give one symbol per sublayer, such as '*-*-' for twice attention and MLP.",
    ),
    Refusal(
        lambda args: args.num_layers not in (None, get_hybrid_total_layer_count(_pattern(args))),
        "--num-layers contradicts the number of sublayers in --hybrid-layer-pattern: drop --num-layers.",
    ),
    Refusal(
        lambda args: args.transformer_impl == "inference_optimized",
        "--transformer-impl inference_optimized cannot be trained: choose transformer_engine or local.",
    ),
    # Megatron's local layers would take an identity in place of every other kind of sublayer, without a word.
    Refusal(
        lambda args: args.transformer_impl == "local" and set(_pattern(args)) - _LOCAL_SYMBOLS,
        "--transformer-impl local has only the sublayers * (attention), - (MLP) and E (experts): change "
        "--hybrid-layer-pattern or install Transformer Engine.",
    ),
    Refusal(
        lambda args: args.transformer_impl == "local" and args.multi_latent_attention,
        "--multi-latent-attention needs Transformer Engine, which --transformer-impl local does not use: drop either.",
    ),
    Refusal(
        lambda args: args.transformer_impl == "local" and Symbols.MOE in _pattern(args) and args.add_bias_linear,
        "--transformer-impl local cannot train experts with biases: add --disable-bias-linear.",
    ),
    Refusal(
        lambda args: (
            Symbols.MOE in _pattern(args) and args.tensor_model_parallel_size > 1 and not args.sequence_parallel
        ),
        "experts under tensor parallelism need --sequence-parallel: add it.",
    ),
    Refusal(
        lambda args: (args.mtp_num_layers or args.mtp_hybrid_override_pattern) and not _depths(args),
        "further predictions of a HybridModel are written into --hybrid-layer-pattern, such as '*-*-/*-' for one: drop "
        "--mtp-num-layers.",
    ),
    # Megatron would give the last stage a head of its own and stop at the first checkpoint.
    Refusal(
        lambda args: (
            _depths(args) and args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights
        ),
        "multi-token prediction on several pipeline stages cannot share embedding and head: add "
        "--untie-embeddings-and-output-weights.",
    ),
    Refusal(
        lambda args: not args.eval_interval,
        "--eval-interval is missing, by which Megatron plans validation: give it, with --eval-iters 0 for none.",
    ),
    # Megatron asks Transformer Engine whether fp8 is on wherever it recomputes a module without keeping its output.
    Refusal(
        lambda args: not HAVE_TE and {"layernorm", "moe_act"} & set(args.recompute_modules or ()),
        "--recompute-modules layernorm and moe_act need Transformer Engine: leave them out.",
    ),
    # Megatron's batched send and receive between the same two ranks is silently wrong here.
    Refusal(
        _interleaved_without_overlap,
        "--no-overlap-p2p-communication computes wrong results on two pipeline ranks of several stages each: drop it.",
    ),
    _flag("heterogeneous_layers_config_path", "does not apply to a HybridModel: drop it."),
    _flag("heterogeneous_layers_config_encoded_json", "does not apply to a HybridModel: drop it."),
    _flag("perform_rl_step", "is reinforcement learning, which this entry point does not do: drop it."),
    _flag("inprocess_restart", "is not supported by this entry point: use torchrun --max-restarts."),
)

_UNTESTED = "is not supported together with a virtual width: drop it, or drop --vwn-m and --vwn-n."
_FSDP = "shards parameters in ways that the virtual width does not know: use --use-distributed-optimizer."
_CUDA_GRAPH = "captures layers in ways that the virtual width does not know: drop it."
_NO_RESIDUAL = "changes a residual connection that a virtual width replaces: drop it."
_OFFLOAD = "does not know the virtual-width stream: drop it and use --recompute-granularity full to save memory."
_WEIGHT_SHARDS = "shards weights in ways that the virtual width does not know: drop it."

# With --vwn-m and --vwn-n.
_WITH_VIRTUAL_WIDTH = (
    _flag("spec", "names other layers than the virtual width has: drop it."),
    _flag("multi_latent_attention", "is derived from the symbol + in --hybrid-layer-pattern: drop it."),
    _flag("apply_residual_connection_post_layernorm", _NO_RESIDUAL),
    _flag("fused_residual_rmsnorm", _NO_RESIDUAL),
    _flag("use_transformer_engine_op_fuser", _UNTESTED),
    _flag("use_megatron_fsdp", _FSDP),
    _flag("use_torch_fsdp2", _FSDP),
    _flag("init_model_with_meta_device", _FSDP),
    _flag("tensor_parallel_num_weight_shards", _WEIGHT_SHARDS),
    _flag("expert_tensor_parallel_num_weight_shards", _WEIGHT_SHARDS),
    Refusal(lambda args: args.cuda_graph_impl != "none", f"--cuda-graph-impl {_CUDA_GRAPH}"),
    _flag("enable_cuda_graph", _CUDA_GRAPH),
    _flag("external_cuda_graph", _CUDA_GRAPH),
    _flag("optimizer_cuda_graph", _UNTESTED),
    _flag("overlap_moe_expert_parallel_comm", "runs the parts of a layer without its connection: drop it."),
    _flag("delay_wgrad_compute", _UNTESTED),
    # The width partition holds another slice on every tensor-parallel rank; Megatron would gather them as one tensor.
    _flag(
        "distribute_saved_activations", "would mix the slices that tensor-parallel ranks hold of the stream: drop it."
    ),
    _flag("fine_grained_activation_offloading", _OFFLOAD),
    _flag("cpu_offloading_num_layers", _OFFLOAD),
    _flag("moe_paged_stash", _OFFLOAD),
    _flag("use_mup", "scales learning rates by width and has no rule for a virtual width: drop it."),
    Refusal(
        lambda args: args.optimizer not in ("adam", "sgd"),
        "--optimizer must be adam or sgd with a virtual width: the others have not been tried on its parameters.",
    ),
    Refusal(
        lambda args: args.ckpt_format != "torch_dist",
        "--ckpt-format must be torch_dist with a virtual width: it is the only format that other layouts can load.",
    ),
    Refusal(
        lambda args: args.non_persistent_ckpt_type in ("local", "in_memory"),
        "--non-persistent-ckpt-type must be global with a virtual width.",
    ),
    _flag("ckpt_convert_format", "is not supported with a virtual width, which has only torch_dist: drop it."),
    _flag("moe_use_upcycling", _UNTESTED),
)


def refuse_yaml(argv: Sequence[str]) -> None:
    """Refuse ``--yaml-cfg``, which makes Megatron's parser throw away all flags, ``--vwn-*`` among them."""
    if any(token.partition("=")[0] == "--yaml-cfg" for token in argv):
        raise VirtualWidthError(
            "--yaml-cfg would replace the --vwn-* flags: give Megatron's flags on the command line."
        )


def refuse_unsupported(args: Args, virtual_width: VirtualWidthConfig | None) -> None:
    """Refuse flags, and models and layouts that flags ask for, that cannot run.

    Args:
        args: parsed flags, before Megatron's ``validate_args``.
        virtual_width: None for the ordinary model.

    Raises:
        VirtualWidthError: the sentence of the first rule that applies.
    """
    for rule in _ALWAYS if virtual_width is None else _ALWAYS + _WITH_VIRTUAL_WIDTH:
        if rule.applies(args):
            raise VirtualWidthError(rule.sentence)
    if virtual_width is None or args.hidden_size is None:  # a missing --hidden-size is Megatron's to refuse
        return
    virtual_width.check_model(
        hidden_size=args.hidden_size, tied_embeddings=not args.untie_embeddings_and_output_weights
    )
    virtual_width.check_parallel(
        hidden_size=args.hidden_size,
        tensor_parallel_size=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )
